"""Whether what came out is what was asked for: :func:`disappointments` warns, once, where it is not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..budget.targets import show
from ..cost import NAMES, cost
from ..coupling.groups import Groups, couple
from ..cutting.plan import Plan
from ..cutting.rewrite import removed
from ..errors import LessThanAsked, warn
from ..names import Makers, named
from ..options import whole
from ..select import width
from ..tracing.choices import least
from ..tracing.graph import Graph
from ..tracing.trees import leaf_tensors
from .request import DEPTH, Request

SHORT = 0.1  # a ratio r that removes less than this times r of all parameters fell far short


def disappointments(graph: Graph, model: nn.Module, plan: Plan, request: Request) -> None:
    """Warn where nothing was cut although something was asked for, or far less than the ratio says."""
    texts = [*_unheard(graph, model, plan, request), *_as_many_as_chosen(graph, request)]
    if not texts:
        texts = [_met_already(graph, request) if not plan.cuts and not plan.parts else _far_short(model, plan, request)]
    if any(texts):
        warn("; ".join(texts), LessThanAsked)


def _unheard(graph: Graph, model: nn.Module, plan: Plan, request: Request) -> list[str]:
    """The names with a ratio or a width of their own that cut nothing, each with what holds it."""
    overrides = _overrides(request)
    if not overrides or not any(each.spec.coarse for each in request.wanted):
        return []
    groups = couple(graph, tuple((name, None) for name in request.keep if name in graph.leaves), free=request.free)
    makers = Makers(groups, model)
    texts = []
    for key, wide in overrides:
        makes = [groups.groups[index] for index in makers.of(key)]
        if any(axis in plan.cuts.get(name, ()) for group in makes for name, axis in group.places):
            continue
        if wide is not None and makes and all(makers.units(group, key, wide) == group.size for group in makes):  # as wide as it is
            continue
        if not makes:
            reason = _held(groups, named(model, [key]))
        else:
            reason = f"the ratio is too small for {makes[0].size} units" if wide is None else "it is left whole for the reasons in the notes of the plan"
        name = key if isinstance(key, str) else getattr(key, "__name__", key)
        texts.append(f"the {'ratio' if wide is None else 'width'} of {name!r} cuts nothing: {reason}")
    return texts


def _as_many_as_chosen(graph: Graph, request: Request) -> list[str]:
    """The share of experts that cannot go, since the code chooses so many for every token."""
    asked = next((each for each in request.wanted if each.spec.name == "experts"), None)
    if asked is None or not graph.choices or isinstance(asked.amount, int):
        return []
    share, groups = request.ratio if asked.amount is None else asked.amount, couple(graph)
    for index, enough in least(groups, graph.choices).items():
        size = groups.groups[index].size
        if width(size, share) < enough:
            return [f"a share of {share:g} of {size} experts was to go; the code chooses {enough} for every token, so {enough} stay"]
    return []


def _overrides(request: Request) -> list[tuple[Any, int | None]]:
    """The keys with a ratio (None) or a width of their own."""
    ratios, widths = request.widths.ratios, request.widths.to
    shares = [(key, None) for key, ratio in ratios.items() if ratio > 0] if isinstance(ratios, Mapping) else []
    return [*shares, *((key, wide) for key, wide in widths.items() if not whole(key))]


def _held(groups: Groups, tensors: Sequence[str]) -> str:
    """What keeps the outputs of some tensors whole, and the nearest names that can be cut."""
    locked = [(axis, name) for name, axis in groups.locked if name in tensors]
    nearest = difflib.get_close_matches(tensors[0], [group.name for group in groups], 3, 0.3) if tensors else []
    hint = f"; what can be cut is, say, {', '.join(nearest)}" if nearest else ""
    if not locked:
        return f"it fits nothing that can be cut{hint}"
    axis, name = min(locked)
    return f"{name} axis {axis}: {groups.locked[name, axis]}{hint}"


def _met_already(graph: Graph, request: Request) -> str:
    asked = [name for name in NAMES if getattr(request.aims, name) is not None]
    if asked:
        full = cost(couple(graph))
        limits = request.aims.limits(full)
        rows = [f"{name}: at most {show(name, limits[name])} were asked for, the model has {show(name, getattr(full, name))}" for name in asked]
        return f"nothing was cut: the model meets its targets already ({'; '.join(rows)})"
    first, *others = request.wanted
    if request.ratio and request.spec.name not in DEPTH and not request.spec.coarse and request.spec.threshold is None and not others:
        return f"ratio={request.ratio:g} removes nothing: no weight has enough units of granularity {request.spec.text!r} for it"
    if request.aims.timed or not request.ratio or not request.spec.coarse or others or first.amount is not None:
        return ""
    return f"ratio={request.ratio:g} removes nothing: no group has enough units for it, or multiple_of and at_least keep them all"


def _far_short(model: nn.Module, plan: Plan, request: Request) -> str:
    if plan.parts or request.aims.any or request.text not in ("channel", "channels") or request.keep or request.wanted[0].amount is not None:
        return ""
    total = sum(math.prod(tensor.shape) for *_, tensor in leaf_tensors(model))
    share = removed(plan.shapes, plan.cuts) / max(total, 1)
    if share >= SHORT * request.ratio:
        return ""
    return f"ratio={request.ratio:g} removed {share:.1%} of the parameters: most of them lie in axes that stay whole; print(plan.explain()) says which, and why"
