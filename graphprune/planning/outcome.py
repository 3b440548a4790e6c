"""Whether what came out is what was asked for: :func:`disappointments` warns, once, where it is not."""

from __future__ import annotations

import math

from torch import nn

from ..budget.targets import show
from ..cost import NAMES, cost
from ..coupling.groups import couple
from ..cutting.plan import Plan
from ..cutting.rewrite import removed
from ..errors import LessThanAsked, warn
from ..tracing.trace import Graph
from ..tracing.trees import leaf_tensors
from .request import Request

SHORT = 0.1  # a ratio r that removes less than this times r of all parameters fell far short


def disappointments(graph: Graph, model: nn.Module, plan: Plan, request: Request) -> None:
    """Warn where nothing was cut although something was asked for, or far less than the ratio says."""
    text = _met_already(graph, request) if not plan.cuts and not plan.parts else _far_short(model, plan, request)
    if text:
        warn(text, LessThanAsked)


def _met_already(graph: Graph, request: Request) -> str:
    asked = [name for name in NAMES if getattr(request.aims, name) is not None]
    if asked:
        full = cost(couple(graph))
        limits = request.aims.limits(full)
        rows = [f"{name}: at most {show(name, limits[name])} were asked for, the model has {show(name, getattr(full, name))}" for name in asked]
        return f"nothing was cut: the model meets its targets already ({'; '.join(rows)})"
    if request.aims.timed or not request.ratio or not request.spec.coarse:
        return ""
    return f"ratio={request.ratio:g} removes nothing: no group has enough units for it, or multiple_of and at_least keep them all"


def _far_short(model: nn.Module, plan: Plan, request: Request) -> str:
    if plan.parts or request.aims.any or not request.spec.coarse or request.spec.name == "head" or request.keep:
        return ""
    total = sum(math.prod(tensor.shape) for *_, tensor in leaf_tensors(model))
    share = removed(plan.shapes, plan.cuts) / max(total, 1)
    if share >= SHORT * request.ratio:
        return ""
    return f"ratio={request.ratio:g} removed {share:.1%} of the parameters: most of them lie in axes that stay whole; print(plan.explain()) says which, and why"
