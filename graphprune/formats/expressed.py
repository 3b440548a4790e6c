"""Uniform widths for a model with a configuration: :func:`expressed` returns a plan whose widths that configuration can say."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

from torch import nn

from ..coupling.groups import couple
from ..cutting.plan import Plan
from ..errors import BadTarget, NothingToPrune
from ..planning.planner import Planner
from ..planning.request import DEPTH, Request
from ..planning.uniform import pattern
from ..tracing.graph import Graph
from .advice import advice
from .blocks import in_their_places
from .closing import Lists, before_closing
from .config import Slot, Solution
from .misfit import misfit
from .rebuilt import configured

ROUNDS = 12  # plans that are tried
ANYWAY = "uniform=False cuts it all the same; graphprune.save(small, folder) then keeps it, and graphprune.load(folder, base) reads it"
WORTH = 1 / 3  # of what a ratio removes freely: where a configuration allows less, it is not kept to
UNSAID = "note: no configuration of this model says these widths"


def expressed(graph: Graph, model: nn.Module, request: Request, decide: Planner) -> Plan:
    """The plan that ``decide`` makes; of a model with a configuration one whose widths that can say, where it is asked for or nothing that is named is lost.

    What no number of the configuration says is first given the share of what it is derived with (heads and the width they divide), then left whole,
    with the reason in the notes of the plan.
    """
    plan = decide(graph, model, request)
    if request.uniform is False or not configured(model):
        return plan
    if all(each.spec.name in DEPTH for each in request.wanted):
        return in_their_places(graph, model, request, decide, plan)
    if not any(each.spec.coarse for each in request.wanted):
        return plan
    if request.uniform:
        return _adapted(graph, model, request, decide, plan)
    wrong = misfit(graph, model, plan)
    return _preferred(graph, model, request, decide, plan) if wrong.reason else plan


def _preferred(graph: Graph, model: nn.Module, request: Request, decide: Planner, free: Plan) -> Plan:
    """Uniform widths instead of those that no configuration says; the latter, with a note, where the first miss the target, a kind that is named, or most."""
    alike = replace(request, widths=replace(request.widths, uniform=True))
    try:
        plan = _adapted(graph, model, alike, decide, decide(graph, model, alike))
    except (BadTarget, NothingToPrune) as error:
        plan, reason = free, str(error).partition("\n")[0].partition(". ")[0]
    else:
        reason = plan.notes[-1].removeprefix("note: ") if plan.notes[-1:] == (UNSAID,) else ""
    missed = _slots(free) - _slots(plan)
    if missed and not reason and any(each.name != "channel" for each in request.wanted):
        name, axis = min(missed)
        reason = f"with widths that it says {name} axis {axis} would stay whole"
    if missed and not reason and not request.aims.any and _removed(plan) < WORTH * _removed(free):
        reason = f"widths that it says take {_removed(plan):,} entries of tensors instead of {_removed(free):,}"
    if reason:
        return replace(free, notes=(*free.notes, f"note: its configuration cannot say these widths, and no others do what is asked: {reason}"))
    if not missed:
        return plan
    freely = "widths=graphprune.Widths(uniform=False) cuts them, for graphprune.save and load"
    return replace(plan, notes=(*plan.notes, f"note: {len(missed)} axes stay whole so that save_pretrained writes a model that loads; {freely}"))


def _removed(plan: Plan) -> int:
    """How many entries of tensors a plan removes."""
    left = {name: math.prod(len(axes.get(axis, range(size))) for axis, size in enumerate(plan.shapes[name])) for name, axes in plan.cuts.items()}
    return sum(math.prod(plan.shapes[name]) - count for name, count in left.items())


def _slots(plan: Plan) -> set[Slot]:
    return {(name, axis) for name, axes in plan.cuts.items() for axis in axes}


def _adapted(graph: Graph, model: nn.Module, request: Request, decide: Planner, plan: Plan) -> Plan:
    """A plan for uniform widths, planned again until the configuration says them; the last of its notes is :data:`UNSAID` where none does."""
    notes: list[str] = []
    tied: set[frozenset[Slot]] = set()
    for _ in range(ROUNDS):
        wrong, reason, solution, lists = misfit(graph, model, plan)
        if not reason:
            return replace(plan, notes=(*plan.notes, *notes))
        ties = _ties(solution, wrong, lists) - tied
        if ties:
            tied |= ties
            request = replace(request, tied=(*request.tied, *ties))
        else:
            shut = _widest(graph, _shut(plan, _before(wrong, lists)) or _shut(plan, _before(_beside(solution, wrong), lists)))
            if not shut:
                break
            notes.append(f"note: {sorted(shut)[0][0]} axis {sorted(shut)[0][1]} and {len(shut) - 1} more stay whole: {reason}")
            request = replace(request, keep=(*request.keep, *sorted(shut)), tied=())
        try:
            plan = decide(graph, model, request)
        except NothingToPrune as error:
            said = advice(solution, graph, lists, tuple(each.name for each in request.wanted))
            raise NothingToPrune(f"{_why(solution, wrong)}. {said}{ANYWAY}") from error
    return replace(plan, notes=(*plan.notes, *notes, UNSAID))


def _why(solution: Solution, wrong: frozenset[Slot]) -> str:
    """What a configuration cannot say, in words."""
    name, axis = min(wrong)
    if (name, axis) in solution.gap.axes:
        built, left = solution.gap.axes[name, axis]
        return f"no configuration of this model says what would be left: {name} axis {axis} would have {left}, its class makes {built}"
    return f"no configuration of this model says what would be left: what it says of {name} axis {axis} is also a factor of what the model computes"


def _ties(solution: Solution, wrong: frozenset[Slot], lists: Lists) -> set[frozenset[Slot]]:
    """The axes that have to keep the same share because one number of the configuration says them, with what it does not say by itself."""
    reach = solution.reach().values() if not solution.gap.loads else ()
    ties = {frozenset((*slots, *wrong)) for slots in reach if slots & wrong and slots - wrong}
    return {frozenset((before_closing(name, lists), axis) for name, axis in tie) for tie in ties}


def _before(slots: frozenset[Slot], lists: Lists) -> frozenset[Slot]:
    return frozenset((before_closing(name, lists), axis) for name, axis in slots)


def _beside(solution: Solution, wrong: frozenset[Slot]) -> frozenset[Slot]:
    """What was cut and is said by a number that says something else with it, which was not."""
    return frozenset().union(*(slots for slots in solution.reach().values() if slots & wrong)) - wrong


def _shut(plan: Plan, wrong: frozenset[Slot]) -> set[Slot]:
    """The axes of a plan to leave whole: those that are wrong, or else all others of their tensors."""
    shut = {(name, axis) for name, axis in wrong if axis in plan.cuts.get(name, {})}
    return shut or {(name, axis) for name, _ in wrong for axis in plan.cuts.get(name, {})}


def _widest(graph: Graph, shut: set[Slot]) -> set[Slot]:
    """Those axes of ``shut`` that belong to the kind of unit with most of them: the others may be right once these are whole (an MLP beside a stream)."""
    kinds: dict[frozenset[Slot], set[Slot]] = defaultdict(set)
    for group in couple(graph):
        places = shut.intersection(group.places)
        if places:
            kinds[frozenset((pattern(name), axis) for name, axis in group.places)] |= places
    return max(kinds.values(), key=len, default=shut)
