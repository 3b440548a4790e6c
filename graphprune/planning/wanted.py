"""What a request says about kinds of unit, as rules for the groups of one coupling: which may go, how much, and in what steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
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
from .request import Request
from .units import kind


def others(groups: Groups, request: Request) -> list[tuple[Array, str]]:
    """Locks for the groups that are of no kind that is wanted; raises :class:`~graphprune.errors.NothingToPrune` where there is none of a kind."""
    if any(each.spec.name == "channel" for each in request.wanted):
        return []
    if request.text in ("head", "heads"):
        return list(attention.others(groups))
    mine = set()
    for each in request.wanted:
        found = of_kind(groups, each.spec.name)
        if not found:
            raise NothingToPrune(
                f"nothing of this model that can be cut is of the kind {each.name!r}; graphprune.widths(model, example_input) lists what there is"
            )
        mine |= found
    return [(np.asarray(group.units), f"only {request.text} are cut") for group in groups if group.index not in mine]


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
        for index in of_kind(groups, each.spec.name):
            size = groups.groups[index].size
            if not isinstance(each.amount, float) and each.amount > size:
                raise BadRatio(f"{each.amount} units of {each.name} were asked for; {groups.groups[index].name} has {size}")
            if not isinstance(each.amount, float) and each.amount < enough.get(index, 1):
                raise BadRatio(f"{each.amount} units of {each.name} were asked for; the code chooses {enough[index]} for every token: so many stay")
            ratios[index] = each.amount if isinstance(each.amount, float) else 1 - each.amount / size
    return ratios


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
