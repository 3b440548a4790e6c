"""The plan for what is asked: one planner for whole modules, one for widths, one for entries, and :mod:`~graphprune.planning.together` for several of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from ..cutting.apply import apply
from ..cutting.plan import Plan
from ..cutting.verify import check
from ..errors import BadRatio, BadScore, NotEqual
from ..scores import SCORES, Score
from ..scores.attempts import attempts, remembered
from ..timing.latency import predicted, reach, steps
from ..tracing.graph import Graph
from ..tracing.trace import trace
from .depth import plan_depth
from .entries import plan_entries
from .listed import plan_listed
from .request import DEPTH, Request
from .together import together
from .trial import best
from .vocabulary import plan_vocabulary
from .wanted import multiples
from .widths import plan_widths

Planner = Callable[[Graph, nn.Module, Request], Plan]


def decide(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan for what is asked of the model."""
    stages = [part for stage in request.stages for part in _listed_first(graph, stage)]
    plan = one_stage(graph, model, stages[0]) if len(stages) == 1 else together(graph, model, stages, one_stage)
    return replace(plan, notes=(*plan.notes, *request.notes)) if request.notes else plan


def _listed_first(graph: Graph, stage: Request) -> list[Request]:
    """A stage in which experts go, as one for those that are modules of lists and one for all others."""
    experts = tuple(each for each in stage.wanted if each.spec.name == "experts")
    if not graph.mixtures or not experts:
        return [stage]
    others = stage.wanted if graph.choices else tuple(each for each in stage.wanted if each not in experts)
    return [replace(stage, wanted=experts, listed=True, alone=stage.alone and not others), *([replace(stage, wanted=others)] if others else [])]


def one_stage(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan for kinds of unit that one planner chooses."""
    if request.spec.name in DEPTH:
        return plan_depth(graph, model, _by_name(request))
    if not request.spec.coarse:
        return plan_entries(graph, model, _by_name(request))
    if request.listed:
        return plan_listed(graph, model, with_steps(graph, model, request))
    if request.spec.coupled:
        return plan_vocabulary(graph, model, with_steps(graph, model, request))
    if request.spec.apart:
        graph = trace(model, *graph.example, outputs=graph.asked.outputs, examples=graph.asked.others, apart=True)
    aims, scope = request.aims, request.scope
    request = replace(with_steps(graph, model, request), extra_costs=predicted(graph, aims, scope))
    scored = remembered(attempts(model, request.score, request.batches, request.loss, draft=scope == "layer" and not aims.any))
    if aims.timed:
        return reach(model, graph, aims, lambda costs: plan_widths(graph, model, replace(request, extra_costs=costs), scored), scope)
    return best(graph, model, request, scored)


def with_steps(graph: Graph, model: nn.Module, request: Request) -> Request:
    """The request with what widths are multiples of, now that the graph is known."""
    multiple = request.widths.multiple_of
    return replace(request, multiple_of=multiples(request.widths, model) if isinstance(multiple, Mapping) else steps(multiple, graph, request.aims))


def _by_name(request: Request) -> Request:
    """What is pruned without widths takes scores by their names alone, and no widths allocated by cost."""
    score, text = request.score, request.spec.text
    if request.scope not in ("layer", "global", "isomorphic"):
        raise BadRatio(f"scope is {request.scope!r}; with granularity {text!r} it is 'layer', 'global' or 'isomorphic'")
    if not isinstance(score, Score):
        return request
    if score.options != SCORES[score.name].options:
        raise BadScore(f"granularity {text!r} takes no options of a score, {score.options} were given; give the name {score.name!r}")
    return replace(request, score=score.name)


def proved(graph: Graph, model: nn.Module, request: Request, planner: Planner, plan: Plan | None = None) -> tuple[Plan, nn.Module]:
    """A plan and the cut model, once it computes what the zeroed original computes; what it differs by is looked for, left whole, and planned again.

    Both times it is ``planner`` that plans, unless there is a ``plan`` by now. The cut model has its whole vocabulary: fewer tokens are its last cut.
    Raises :class:`~graphprune.errors.NotEqual` where nothing that is left whole makes them equal.
    """
    plan = plan or planner(graph, model, request)
    small = apply(model, plan.stages[0])
    try:
        check(graph, model, small, plan.stages[0])
    except NotEqual:
        if not any(each.spec.coarse for each in request.wanted):
            raise
        plan = planner(graph, model, replace(request, proof="values"))
        small = apply(model, plan.stages[0])
        check(graph, model, small, plan.stages[0])
    return plan, small
