"""``Repair(batches, rounds=4)``: the way to a budget in rounds, each planned on the repaired model that the rounds before it left (:func:`in_rounds`).

What a unit is worth depends on which others are still there, in its own layer as in others. A score that is made for repair knows of its own layer; scores
taken anew of a model that has been repaired know of all, at the price of as many passes. Every repair is made from the original, so nothing adds up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from .automatic import closed_steps
from .cost import cost
from .coupling.groups import couple
from .cutting.apply import apply
from .cutting.compose import compose
from .cutting.plan import Plan
from .errors import BadCalibration, BadOption
from .options import Repair
from .planning.planner import Planner
from .planning.request import Request
from .repair import repair
from .tracing.graph import Graph
from .tracing.trace import trace


def in_rounds(planner: Planner, asked: Repair | None) -> Planner:
    """The planner that goes the rounds that a repair asks for; ``planner`` itself where that is one."""
    return planner if asked is None or asked.rounds == 1 else partial(_gradual, planner, asked)


def _gradual(planner: Planner, asked: Repair, graph: Graph, model: nn.Module, request: Request) -> Plan:
    """One plan for the model as it was, of all rounds; raises what ``planner`` raises, and BadOption where there is no budget to share out."""
    _check(asked, request)
    full = cost(couple(graph))
    limits = request.aims.limits(full)
    facts = {"target": asked.target, "spare": asked.spare, "rows": asked.rows, "progress": asked.progress}
    small, here, plans = model, graph, []
    for number in range(1, asked.rounds + 1):
        share = number / asked.rounds
        bounds = {name: math.floor(getattr(full, name) * (1 - share) + limit * share + 1e-6) for name, limit in limits.items()}
        plans.append(planner(here, small, replace(request, aims=replace(request.aims, **bounds))))
        if number < asked.rounds:
            so_far = _joined(plans)
            if so_far.tokens is not None:
                raise BadOption(f"rounds={asked.rounds} share out a budget of widths, and with fewer tokens a model takes other ids; leave rounds= out")
            small = repair(apply(model, so_far), model, so_far, asked.batches, closed_steps(asked), graph=graph, **facts)
            here = trace(small, *graph.example, outputs=graph.asked.outputs, examples=graph.asked.others)
    plan = _joined(plans)
    return replace(plan, notes=(*plan.notes, f"note: planned in {asked.rounds} rounds, each on the repaired model of the one before"))


def _joined(plans: Sequence[Plan]) -> Plan:
    first, *others = plans
    for other in others:
        first = compose(first, other)
    return first


def _check(asked: Repair, request: Request) -> None:
    if asked.batches is None:
        raise BadCalibration(f"rounds={asked.rounds} repair in between, and there is nothing to learn from; give Repair(batches, rounds={asked.rounds})")
    aims = request.aims
    if not aims.any or aims.timed or request.ratio or len(request.stages) > 1 or not request.spec.coarse:
        raise BadOption(f"rounds={asked.rounds} share out a budget of one kind of unit; ask for params=, macs=, size= or memory=, or leave rounds= out")
    if request.widths.ratios or request.widths.to:
        raise BadOption(f"rounds={asked.rounds} share out a budget, and widths of single groups are not shared out; leave either out")
