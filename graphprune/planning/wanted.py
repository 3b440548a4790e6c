"""What a request says about kinds of unit, as rules for the groups of one coupling: which may go, how much, and in what steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from ..catalogue import names
from ..coupling.groups import Groups
from ..errors import BadRatio, NothingToPrune
from ..granularity import heads as attention
from ..granularity.spec import SAME
from ..names import Makers
from ..operations.labels import Array
from ..options import Widths
from ..tracing.choices import least
from .request import Request, Wanted
from .units import kind


def others(groups: Groups, request: Request) -> list[tuple[Array, str]]:
    """Locks for the groups that are of no kind that is wanted; raises :class:`~graphprune.errors.NothingToPrune` where there is none of a kind."""
    if any(each.spec.name == "channel" for each in request.wanted):
        tables = [] if any(each.spec.name == "experts" for each in request.wanted) else [each for each in groups.graph.choices if each.by_table]
        return [(each.labels, "every expert works, and a table weighs them: they go where they are named") for each in tables]
    if request.text in ("head", "heads"):
        return list(attention.others(groups))
    mine = set()
    for each in request.wanted:
        found = of_kind(groups, each.spec.name)
        if not found:
            reason = _held(groups) if each.spec.name == "experts" else ""
            raise NothingToPrune(
                f"nothing of this model that can be cut is of the kind {each.name!r}{reason}; graphprune.widths(model, example_input) lists what there is"
            )
        mine |= found
    text = f"only {request.text} are cut"
    fields = [field.ravel() for leaf in groups.graph.leaves.values() for field in leaf.fields]
    whole = [field for field in fields if (groups.owner[groups.root[field]] < 0).all()]  # as it is here: else such an axis may go for one that is named
    return [(groups.labels_of(index for index in range(len(groups)) if index not in mine), text), *((field, text) for field in whole)]


def _held(groups: Groups) -> str:
    """Why nothing goes of what the code chooses from, if it chooses from anything."""
    places = {(node.op.short, node.where) for node in groups.graph.nodes if node.op.chooses_from is not None or node.op.orders}
    roots = {int(label) for choice in groups.graph.choices for label in groups.root[choice.labels]}
    for (name, axis), reason in groups.locked.items():
        along = (field for field in groups.graph.leaves[name].fields if field.shape[axis] > 1)
        if (reason.op, reason.where) in places or any(roots.issuperset(groups.root[field].ravel().tolist()) for field in along):
            return f" ({reason})"
    return ""


def of_kind(groups: Groups, name: str) -> set[int]:
    """The groups of a kind, by the name of its granularity."""
    if name == "channel":
        return set(range(len(groups)))
    known = kind("heads" if name == "head" else name)
    assert known is not None
    return known.groups(groups)


def amounts(groups: Groups, request: Request) -> dict[int, float]:
    """The ratios of the groups of a kind for which the request says how much goes."""
    ratios, enough = {}, least(groups, groups.graph.choices)
    for each in request.wanted:
        if each.amount is None:
            continue
        indices = of_kind(groups, each.spec.name)
        if isinstance(each.amount, float):
            ratios |= dict.fromkeys(indices, each.amount)
            continue
        full = lengths(groups, each.spec.name, indices)
        for index in indices:
            group = groups.groups[index]
            if not _works(each.amount, group.size, full[index], enough.get(index, 1)):
                raise BadRatio(_refused(each, groups, indices, full, enough))
            ratios[index] = 1 - each.amount / full[index]
    return ratios


def lengths(groups: Groups, name: str, indices: Collection[int]) -> dict[int, int]:
    """What a whole number of a kind counts when all of each group stays: its units, for most."""
    known = kind("heads" if name == "head" else name)
    full = {index: groups.groups[index].size for index in indices}
    return full | {index: length for index, length in (known.counts(groups) if known and known.counts else {}).items() if index in full}


def _works(width: int, size: int, full: int, enough: int) -> bool:
    """Whether so many of ``full`` are whole units of a group of ``size``, and not too few of them."""
    return 0 < width <= full and not width * size % full and width * size // full >= enough


def _refused(asked: Wanted, groups: Groups, indices: Collection[int], full: Mapping[int, int], enough: Mapping[int, int]) -> str:
    """Why a number of units cannot be, and the two nearest that can."""
    most = max(full[index] for index in indices)
    fits = [w for w in range(1, most + 1) if all(_works(w, groups.groups[i].size, full[i], enough.get(i, 1)) for i in indices)]
    first = min(indices, key=lambda index: full[index])
    if asked.amount > full[first]:
        why = f"{groups.groups[first].name} has {full[first]}"
    elif asked.amount < max(enough.get(index, 1) for index in indices):
        why = f"the code chooses {max(enough.get(index, 1) for index in indices)} for every token, and so many stay"
    else:
        why = f"they go {full[first] // groups.groups[first].size} at a time" if full[first] % groups.groups[first].size == 0 else "they go several at a time"
    return f"{asked.amount} units of {asked.name} were asked for; {why}. {nearest_widths(asked.amount, fits)}"


def nearest_widths(width: int, fits: Sequence[int]) -> str:
    """The two nearest numbers that work, in words.

    >>> nearest_widths(5, [2, 4, 6, 8]), nearest_widths(9, [2, 4])
    ('The nearest that work are 4 and 6', 'The nearest that work are 2 and 4')
    """
    below, above = [each for each in fits if each < width], [each for each in fits if each > width]
    two = [*below[-1 if above else -2 :], *above[: 1 if below else 2]] if fits else []
    return f"The nearest that work are {' and '.join(map(str, two))}" if len(two) > 1 else f"What works is {two[0]}" if two else "No other number works"


def multiples(widths: Widths, model: nn.Module) -> Callable[[Groups], Mapping[int, int]]:
    """The multiple of every group, where it depends on the name or the kind."""
    assert isinstance(widths.multiple_of, Mapping)
    table = dict(widths.multiple_of)

    def steps(groups: Groups) -> Mapping[int, int]:
        makers = Makers(groups, model)
        found = {}
        for key, step in table.items():
            known = isinstance(key, str) and SAME.get(key, key) in names("granularity")
            found |= dict.fromkeys(of_kind(groups, SAME.get(key, key)) if known else makers.of(key), step)
        return found

    return steps
