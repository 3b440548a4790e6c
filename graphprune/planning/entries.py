"""The plan of everything finer than channels and heads: entries that become zero, smaller kernels, gathered columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..cost import cost
from ..coupling.groups import couple
from ..cutting.parts import Part, pack
from ..cutting.plan import Plan
from ..errors import NothingToPrune
from ..granularity.entries import ENTRYWISE, check_criterion, n_of_m, stays, views
from ..granularity.evidence import scored
from ..granularity.positions import best_box, realise
from ..granularity.ranking import below, ranked
from ..granularity.spec import Spec
from ..granularity.weights import Weight, weights
from ..names import by_tensor
from ..tracing.graph import Graph
from .limits import reached, smallest
from .request import Request

WHOLE = "stays whole at this ratio"
SLOW = "note: masked entries are stored and multiplied as zeros: stock hardware will not run the model faster for them"


def plan_entries(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan for a granularity finer than whole axes."""
    spec, score = request.spec, request.score
    ratios = by_tensor(model, request.widths.ratios)
    check_criterion(score, ENTRYWISE)
    limits = request.limits(graph, () if spec.says_itself else ("params", "macs", "size") if spec.option == "box" else ("params", "macs"))
    every, whole = weights(graph, model)
    free = [weight for weight in every if weight.leaf not in request.keep and weight.name not in request.keep]
    whole |= {weight.name: "kept on request" for weight in every if weight not in free}
    usable = _usable(free, whole, spec)
    shares = {weight.name: ratios[weight.leaf] for weight in usable if weight.leaf in ratios}
    scores = scored(graph, model, usable, score, request.batches, request.loss)
    keeps, notes = (_box_keeps if spec.option == "box" else _keeps)(scores, shares, request, limits, graph)
    if not usable:
        rows = "\n".join(f"  {name} {why}" for name, why in list(whole.items())[:8])
        raise NothingToPrune(f"no weight of this model can be pruned with granularity {spec.text!r}" + (f":\n{rows}" if rows else ""))
    changes = {}
    for weight, keep in keeps.items():
        keep = keep if weight.mask is None else keep & weight.mask.cpu()
        if keep.all() and weight.mask is None:
            whole[weight.name] = WHOLE
        else:
            changes[weight] = (keep, *_change(weight, keep, spec, graph, model))
    return _plan(changes, whole, notes)


def _change(weight: Weight, keep: torch.Tensor, spec: Spec, graph: Graph, model: nn.Module) -> tuple[Part, str]:
    """What becomes of a weight of which some entries stay, as a part of the plan and in words."""
    if spec.name == "group" and not keep.all():
        return realise(weight, keep, graph, model)
    return Part("mask", weight.name, pack(keep)), "masked"


def _usable(free: Sequence[Weight], whole: dict[str, str], spec: Spec) -> dict[Weight, tuple]:
    """How each weight is seen as units; ``whole`` takes the reasons for those that have none."""
    usable = {}
    for weight in free:
        view = views(weight, spec)
        if spec.option == "box" and (view is None or math.prod(weight.shape[2:]) == 1):
            whole[weight.name] = "has no kernel of more than one tap"
        elif view is None:
            whole[weight.name] = f"has no units of granularity {spec.name!r}"
        elif spec.name == "n:m" and weight.shape[weight.inputs] % spec.of:
            whole[weight.name] = f"sums over {weight.shape[weight.inputs]} entries, which {spec.of} does not divide"
        else:
            usable[weight] = view
    return usable


def _keeps(
    scores: dict[Weight, torch.Tensor], shares: dict[str, float], request: Request, limits: dict, graph: Graph
) -> tuple[dict[Weight, torch.Tensor], list[str]]:
    """Which entries of every weight stay, and a line for each limit."""
    spec = request.spec
    if spec.name == "n:m":
        return {weight: n_of_m(weight, spec, units) for weight, units in scores.items()}, []
    if spec.threshold is not None:
        return {weight: stays(weight, spec, gone) for weight, gone in below(scores, spec).items()}, []
    pools = ranked(scores, spec, request.scope, shares)
    ratio, notes = request.ratio, []
    if limits:
        full = cost(couple(graph))

        def costs(share: float) -> dict[str, float]:
            saved = [pool.saved(share) for pool in pools]
            return {name: getattr(full, name) - sum(each[name] for each in saved) for name in limits}

        ratio = smallest(costs, limits, ratio, spec.text)
        notes = reached(costs(ratio), limits)
    gone = {weight: units for pool in pools for weight, units in pool.gone(ratio, strict=not limits and request.alone).items()}
    return {weight: stays(weight, spec, gone[weight]) for weight in scores}, notes


def _box_keeps(
    scores: dict[Weight, torch.Tensor], shares: dict[str, float], request: Request, limits: dict, graph: Graph
) -> tuple[dict[Weight, torch.Tensor], list[str]]:
    """Whole rows and columns of taps stay, the same for every filter and channel of a layer."""
    taps = {weight: units.reshape(weight.shape[2:]).cpu() for weight, units in scores.items()}
    taps = {weight: tap.square() if request.score == "l2" else tap for weight, tap in taps.items()}
    ratio, notes = request.ratio, []
    if limits:
        full = cost(couple(graph))
        bytes_ = {weight: graph.leaves[weight.leaf].dtype.itemsize for weight in taps}

        def costs(share: float) -> dict[str, float]:
            remaining = {name: float(getattr(full, name)) for name in limits}
            for weight, tap in taps.items():
                box = best_box(tap, shares.get(weight.name, min(share, 1 - 1 / tap.numel())), weight.name)
                gone = math.prod(weight.shape) * (1 - math.prod(map(len, box)) / tap.numel())
                each = {"params": gone, "macs": gone * weight.macs, "size": gone * bytes_[weight]}
                remaining = {name: value - each[name] for name, value in remaining.items()}
            return remaining

        levels = [step / tap.numel() for tap in taps.values() for step in range(tap.numel())]
        ratio = smallest(costs, limits, ratio, request.spec.text, levels)
        notes = reached(costs(ratio), limits)
    keeps = {}
    for weight, tap in taps.items():
        most = 1 - 1 / tap.numel() if limits or not request.alone else 1.0
        box = best_box(tap, shares.get(weight.name, min(ratio, most)), weight.name)
        keeps[weight] = torch.zeros(weight.shape, dtype=torch.bool)
        keeps[weight][(slice(None), slice(None), *torch.meshgrid(*map(torch.tensor, box), indexing="ij"))] = True
    return keeps, notes


def _plan(changes: dict[Weight, tuple[torch.Tensor, Part, str]], whole: dict[str, str], notes: list[str]) -> Plan:
    parts, cuts, lines, slow = [], {}, [*notes], False
    for weight, (keep, part, how) in changes.items():
        parts.append(part)
        if part.kind == "kernel":
            cuts[weight.leaf] = {axis: list(taps) for axis, taps in enumerate(part.data, start=2) if len(taps) < weight.shape[axis]}
        slow |= part.kind == "mask"
        count = int(keep.sum())
        lines.append(f"{weight.name}: {count} of {keep.numel()} weights stay ({1 - count / keep.numel():.2%} gone), {how}")
    lines += [f"whole: {name}: {why}" for name, why in whole.items()]
    shapes = {part.name: weight.shape for weight, (_, part, _) in changes.items()}
    return Plan(cuts, shapes, (), (SLOW,) if slow else (), tuple(lines), parts=tuple(parts))
