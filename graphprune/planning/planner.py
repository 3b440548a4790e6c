"""The plan for what is asked: widths that the model's own code allows, once or until a time is met; or fewer layers, or entries, without any widths."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..cutting.plan import Plan
from ..scores.attempts import attempts, remembered
from ..timing.latency import predicted, reach, steps
from ..tracing.trace import Graph
from .entries import finer
from .request import Request
from .trial import best
from .widths import plan_widths


def decide(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan for what is asked of the model."""
    if not request.spec.coarse:
        return finer(graph, model, request)
    aims, scope = request.aims, request.scope
    request = replace(request, multiple_of=steps(request.multiple_of, graph, aims), more=predicted(graph, aims, scope))
    scored = remembered(attempts(model, request.criterion, request.batches, request.loss, draft=scope == "layer" and not aims.any))
    if aims.timed:
        return reach(model, graph, aims, lambda more: plan_widths(graph, model, replace(request, more=more), scored), scope)
    return best(graph, model, request, scored)
