"""A whole number of units is kept to the unit, or refused with the two nearest numbers that work: :func:`exactly`.

A width may be one that the code, or a configuration that one number has to say it in, does not allow: heads that do not divide the width they are cut from,
groups of a norm, a fixed number of parts. What works is found by planning other widths, with scores that cost nothing, since how many units go hardly
depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..coupling.groups import Groups, couple
from ..cutting.parts import GONE
from ..cutting.plan import Plan
from ..errors import BadRatio, GraphpruneError, NothingToPrune
from ..tracing.graph import Graph
from ..tracing.trace import trace
from .request import DEPTH, Request, Wanted
from .wanted import lengths, nearest_widths, of_kind

NEAR, TRIES = 8, 16  # neighbours that are tried on either side, and others, whose numbers divide well

Planner = Callable[[Graph, nn.Module, Request], Plan]


def exactly(graph: Graph, model: nn.Module, request: Request, planner: Planner) -> Plan:
    """The plan that ``planner`` makes; raises :class:`~graphprune.errors.BadRatio` where a whole number of units that was asked for does not work.

    >>> from .planner import decide
    >>> from .request import ask
    >>> from ..tracing.trace import trace
    >>> from ..options import Widths
    >>> net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> exactly(trace(net, torch.zeros(1, 3)), net, ask(net, what={"mlp": 6}, widths=Widths(multiple_of=4)), decide)
    Traceback (most recent call last):
    ...
    graphprune.errors.BadRatio: 6 units of mlp do not work here: the code allows 8 of 0.weight instead. The nearest that work are 4 and 8
    """
    numbers = [each for each in request.wanted if type(each.amount) is int and each.spec.coarse and not each.spec.coupled]
    if not numbers or any(each.spec.name in DEPTH for each in request.wanted):  # of modules that are gone nothing can be counted
        return planner(graph, model, request)
    failed: NothingToPrune | None = None
    try:
        plan = planner(graph, model, request)
        amiss = [(each, text) for each in numbers for text in [_amiss(graph, model, plan, each)] if text]
    except NothingToPrune as error:
        failed, amiss = error, [(numbers[0], f"with it {str(error).splitlines()[0]}")]
        plan = None
    if plan is not None and not amiss:
        return plan
    asked, text = amiss[0]
    full = max(lengths(*_counted(graph, model, asked)).values(), default=0)
    low, high = _neighbours(graph, model, request, planner, asked, full)
    if failed is not None and low is None and high in (None, full):
        raise failed
    fits = [width for width in (low, high) if width is not None]
    raise BadRatio(f"{asked.amount} units of {asked.name} do not work here: {text}. {nearest_widths(int(asked.amount), fits)}")


def _counted(graph: Graph, model: nn.Module, asked: Wanted) -> tuple[Groups, str, set[int]]:
    """The groups of a kind, as its planner couples them."""
    spec = asked.spec
    other = trace(model, *graph.example, apart=True) if spec.apart else graph
    groups = couple(other, locks=tuple(spec.locks(other)) if spec.locks else ())
    return groups, spec.name, of_kind(groups, spec.name)


def _amiss(graph: Graph, model: nn.Module, plan: Plan, asked: Wanted) -> str:
    """What a plan leaves of a kind where it is not what was asked for, in words."""
    groups, name, indices = _counted(graph, model, asked)
    full = lengths(groups, name, indices)
    gone = tuple(f"{part.name}." for part in plan.parts if part.kind in GONE)
    for index in sorted(indices):
        group = groups.groups[index]
        (leaf, axis), units = next(iter(group.places.items()))
        if gone and leaf.startswith(gone):
            continue
        kept = plan.cuts.get(leaf, {}).get(axis)
        left = group.size if kept is None else len(np.setdiff1d(np.unique(units[kept]), [-1]))
        if left * full[index] != asked.amount * group.size:
            return f"the code allows {left * full[index] // group.size} of {leaf} instead"
    return ""


def _neighbours(graph: Graph, model: nn.Module, request: Request, planner: Planner, asked: Wanted, full: int) -> tuple[int | None, int | None]:
    """The nearest widths below and above that work."""

    def works(width: int) -> bool:
        wanted = tuple(replace(each, amount=width) if each is asked else each for each in request.wanted)
        trial = replace(request, wanted=wanted, score=_no_scores, batches=None, loss=None, faults=list(request.faults))
        try:
            return not _amiss(graph, model, planner(graph, model, trial), replace(asked, amount=width))
        except GraphpruneError:
            return False

    width = int(asked.amount)
    low = next((each for each in _candidates(width, full, -1) if works(each)), None)
    high = next((each for each in _candidates(width, full, 1) if each == full or works(each)), None)
    return low, high


def _no_scores(groups: Groups, model: nn.Module, batches: object) -> list[torch.Tensor]:
    return [torch.zeros(group.size, dtype=torch.float64) for group in groups]


def _candidates(width: int, full: int, way: int) -> Iterator[int]:
    """Widths on one side, the nearest first: all neighbours, then multiples of what divides the whole.

    >>> list(_candidates(30, 32, 1)), list(_candidates(100, 128, -1))[8:]
    ([31, 32], [64])
    """
    steps = [step for step in range(1, full) if not full % step]
    further = {(width // step + (way > 0)) * step - (step if way < 0 and not width % step else 0) for step in steps}
    near = [width + way * step for step in range(1, NEAR + 1)]
    others = sorted((each for each in further if each not in near and (each - width) * way > 0), key=lambda each: abs(each - width))
    yield from (each for each in (*near, *others)[:TRIES] if 0 < each <= full)
