"""What is asked, decided: the score where none was named, the rounds to a budget, and a plan that proves right; :func:`decided`.

Whoever plans for a user plans through :data:`PLANNER`: whole numbers to the unit, and of a model with a configuration what that can say.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from .automatic import AUTO, with_score
from .cutting.apply import apply
from .cutting.plan import Plan
from .formats.expressed import expressed
from .gradual import in_rounds
from .options import Repair
from .planning.exact import exactly
from .planning.planner import Planner, decide, proved
from .planning.request import Request
from .ranks import agreed
from .tracing.graph import Graph

PLANNER: Planner = partial(exactly, planner=partial(expressed, decide=decide))


def score_of(score: object, repairs: Repair | None, budget: bool) -> object:
    """The score that is asked for; where none is, with inputs to learn from and a budget to spend, what loses least after the repair."""
    if score is None:
        return AUTO if repairs is not None and budget else "l2"
    return score


def decided(graph: Graph, model: nn.Module, request: Request, repairs: Repair | None, verify: bool) -> tuple[Plan, nn.Module]:
    """The plan, and the model cut by the first of its stages; on ranks that share the work, by the plan of the first rank.

    ``verify``: compared with the zeroed original; else the plan is rehearsed without values. Raises what the planner raises, and
    :class:`~graphprune.errors.NotEqual`.
    """
    request = replace(request, calibration=None if repairs is None else repairs.batches, proof="" if verify else "calls")
    request, repairs, plan = with_score(graph, model, request, repairs, partial(in_rounds, PLANNER))
    planner = in_rounds(PLANNER, repairs)
    if verify:
        plan, small = proved(graph, model, request, planner, plan)
    else:
        plan = plan or planner(graph, model, request)
        small = apply(model, plan.stages[0])
    common = agreed(plan)
    return (plan, small) if common is plan else (common, apply(model, common.stages[0]))
