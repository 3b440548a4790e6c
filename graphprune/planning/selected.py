"""From units that somebody else chose to a plan: :func:`plan_from`.

>>> from ..coupling.groups import couple
>>> from ..cutting.apply import apply
>>> from ..tracing.trace import trace
>>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> groups = couple(trace(net, torch.zeros(1, 4)))
>>> apply(net, plan_from(groups, net, [[0, 3, 5]]))[0].out_features
3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ..coupling.groups import Groups
from ..cutting.plan import Plan, Survivors, make_plan
from ..errors import BadPlan
from ..select import Kept
from ..tracing.symbols import solve
from .proof import Proof
from .widths import why


def plan_from(groups: Groups, model: nn.Module, kept: Sequence[torch.Tensor | Sequence[int]]) -> Plan:
    """The plan that leaves the units ``kept`` of every group: what :func:`~graphprune.select` returns, or any other choice.

    ``kept``: for each of ``groups``, in their order, the numbers of the units that stay, from 0 to ``group.size - 1``, one at least. Sizes in the code follow,
    as in :func:`~graphprune.shrink`; nothing is cut yet (:func:`~graphprune.apply`), and ``model`` is only read.
    Raises :class:`~graphprune.errors.BadPlan` where ``kept`` is no such choice, or where the model's code cannot follow these widths, with the place in it.
    """
    units = _checked(groups, kept)
    edits, unsolved = solve(groups.graph, Survivors(groups, units).length)
    wrong, faults = Proof(groups.graph, model, always=True).judge(groups, units, edits, unsolved)
    if wrong or faults:
        text = why(wrong[0]) if wrong else faults[0].text
        raise BadPlan(f"the code of the model cannot follow these widths: {text}; choose others, or leave the axis whole: couple(graph, keep=((name, axis),))")
    return make_plan(groups, units, edits, ())


def _checked(groups: Groups, kept: Sequence[torch.Tensor | Sequence[int]]) -> Kept:
    if len(kept) != len(groups):
        raise BadPlan(f"there are {len(groups)} groups, and units of {len(kept)} were given; give the numbers of the units that stay of every group")
    units: Kept = []
    for group, numbers in zip(groups, kept, strict=True):
        try:
            stay: torch.Tensor = torch.as_tensor(numbers).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadPlan(f"what stays of group {group.index} ({group.name}) is {numbers!r}; give numbers of units") from error
        if stay.ndim != 1 or not len(stay) or stay.is_floating_point() or stay.dtype == torch.bool:
            raise BadPlan(f"what stays of group {group.index} ({group.name}) is {numbers!r}; give the numbers of its units, one at least")
        stay = cast(Any, stay.long()).unique()
        if int(stay[0]) < 0 or int(stay[-1]) >= group.size:
            raise BadPlan(f"units {int(stay[0])} to {int(stay[-1])} of group {group.index} ({group.name}) are to stay; it has units 0 to {group.size - 1}")
        units.append(stay)
    return units
