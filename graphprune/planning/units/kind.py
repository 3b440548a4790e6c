"""What a kind of unit is: a :class:`Kind` finds the groups whose units are of it; :func:`of_groups` enters one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ...catalogue import enter, entry, names, open_to_others
from ...coupling.groups import Groups
from ...errors import BadOption
from ...granularity import spec
from ...operations.labels import Array
from ...tracing.graph import Graph

assert spec.NAMES  # what they name is entered first
CHANNELS = "channels"  # what is none of the kinds that are found

Find = Callable[[Groups], Iterable[int]]
Locks = Callable[[Graph], list[tuple[Array, str]]]
Coupled = Callable[[Graph], Groups]
Counts = Callable[[Groups], Mapping[int, int]]


@dataclass(frozen=True)
class Kind:
    """A kind of units that are cut from axes: ``find`` returns the numbers of its groups.

    ``counts``: where a whole number does not count units, how many it counts when all of them stay, by the number of the group (entries of a head that go in
    pairs). ``role``: whether it says what a group is (kinds that only choose among groups do not); what is asked first wins.
    """

    name: str
    find: Find
    role: bool = True
    counts: Counts | None = None

    def groups(self, groups: Groups) -> set[int]:
        """The numbers of the groups of this kind; raises :class:`~graphprune.errors.BadOption` where a function of somebody else's returns no such numbers."""
        try:
            indices = {int(index) for index in self.find(groups)}
        except (TypeError, ValueError) as error:
            raise BadOption(f"the granularity {self.name!r} has to return numbers of groups (group.index): {error}") from error
        if indices and not 0 <= min(indices) <= max(indices) < len(groups):
            raise BadOption(f"the granularity {self.name!r} returned {sorted(indices)}; groups are numbered from 0 to {len(groups) - 1}")
        return indices


def of_groups(
    name: str, line: str, *, role: bool = True, apart: bool = False, locks: Locks | None = None, coupled: Coupled | None = None, counts: Counts | None = None
) -> Callable[[Find], Find]:
    """Enter a kind that is cut from axes under ``name``; what was entered first names a group that several kinds claim.

    ``apart``: its groups are those of a run in which copies may go instead of what is copied (``trace(..., apart=True)``).
    ``locks``: what stays whole of a run so that units of this kind may go. ``coupled``: how a run is coupled for them. All three are planned by themselves.
    """

    def entered(find: Find) -> Find:
        enter("granularity", name, line, find, cut=Kind(name, find, role, counts), apart=apart, locks=locks, coupled=coupled)
        return find

    return entered


@open_to_others("granularity")
def _enter(name: str, line: str, function: Find) -> None:
    """From outside: a function ``(groups) -> numbers of groups``."""
    of_groups(name, line, role=False)(function)


def kind(name: str) -> Kind | None:
    """The kind of that name, if it is cut from axes and is not all of them."""
    return entry("granularity", name).facts.get("cut") if name in names("granularity") else None


def roles(groups: Groups) -> Mapping[int, str]:
    """What every group is, by its number: the first kind that claims it, and channels where none does."""
    names_of: dict[int, str] = {}
    for name in names("granularity"):
        known = kind(name)
        if known is not None and known.role:
            names_of |= {index: name for index in known.groups(groups) if index not in names_of}
    return {index: names_of.get(index, CHANNELS) for index in range(len(groups))}
