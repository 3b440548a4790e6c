"""Where literals in the code hold axes back, the plan for the rewritten code is tried as well: :func:`best`."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..cutting.apply import apply
from ..cutting.plan import Plan
from ..cutting.rewrite import removed, spelled
from ..cutting.verify import check
from ..errors import BadTarget, GraphpruneError, NothingToPrune
from ..scores.attempts import Attempts
from ..tracing.graph import Graph
from ..tracing.trace import trace
from .request import Request
from .widths import plan_widths


def best(graph: Graph, model: nn.Module, request: Request, scored: Attempts) -> Plan:
    """The plan; where literals in the code hold axes back, the one for the rewritten code, if that frees more and proves right."""
    literals: set[str] = set()
    plan, nothing = None, GraphpruneError()
    try:
        plan = plan_widths(graph, model, request, scored, literals)[2]
    except (NothingToPrune, BadTarget) as error:
        nothing = error
    if not request.widths.rewrite or not literals:
        if plan is None:
            raise nothing
        return plan
    paths = tuple(sorted(literals))
    try:
        other = spelled(model, paths)
        again = trace(other, *graph.example, outputs=graph.asked.outputs, examples=graph.asked.others, apart=graph.asked.apart)
        trial = plan_widths(again, other, request, scored)[2]
        names = ", ".join(name or "the model" for name in paths)
        note = f"note: sizes are literals in the code of {names}; it is rewritten to read them from attributes, in a subclass of the same name"
        trial = replace(trial, rewrites=paths, notes=(*trial.notes, note))
        check(graph, model, apply(model, trial), trial)
    except GraphpruneError as error:
        if plan is None:
            raise nothing from error
        return replace(plan, notes=(*plan.notes, f"note: not rewritten: {error}"))
    return trial if plan is None or removed(trial.shapes, trial.cuts) > removed(plan.shapes, plan.cuts) else plan
