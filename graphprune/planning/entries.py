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
from ..tracing.trace import Graph
from .limits import reached, smallest
from .request import Request

WHOLE = "stays whole at this ratio"
SLOW = "note: masked entries are stored and multiplied as zeros: stock hardware will not run the model faster for them"


def plan_entries(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan for a granularity finer than whole axes."""
    spec, score = request.spec, request.score
    ratios = by_tensor(model, request.widths.ratios)
    check_criterion(score, ENTRYWISE)
    says_itself = spec.name == "n:m" or spec.threshold is not None
    limits = request.limits(graph, () if says_itself else ("params", "macs", "size") if spec.option == "box" else ("params", "macs"))
    found, left = weights(graph, model)
    mine = [weight for weight in found if weight.leaf not in request.keep and weight.name not in request.keep]
    left |= {weight.name: "kept on request" for weight in found if weight not in mine}
    usable = _usable(mine, left, spec)
    own = {weight.name: ratios[weight.leaf] for weight in usable if weight.leaf in ratios}
    scores = scored(graph, model, usable, score, request.batches, request.loss)
    keeps, notes = (_box_keeps if spec.option == "box" else _keeps)(scores, own, request, limits, graph)
    decided = {}
    for weight, keep in keeps.items():
        keep = keep if weight.mask is None else keep & weight.mask.cpu()
        if keep.all() and weight.mask is None:
            left[weight.name] = WHOLE
        elif spec.name == "group" and not keep.all():
            decided[weight] = (keep, *realise(weight, keep, graph, model))
        else:
            decided[weight] = (keep, Part("mask", weight.name, pack(keep)), "masked")
    if not usable:
        rows = "\n".join(f"  {name} {why}" for name, why in list(left.items())[:8])
        raise NothingToPrune(f"no weight of this model can be pruned with granularity {spec.text!r}" + (f":\n{rows}" if rows else ""))
    return _plan(decided, left, notes)


def _usable(mine: Sequence[Weight], left: dict[str, str], spec: Spec) -> dict[Weight, tuple]:
    """How each weight is seen as units; ``left`` takes the reasons for those that have none."""
    usable = {}
    for weight in mine:
        view = views(weight, spec)
        if spec.option == "box" and (view is None or math.prod(weight.shape[2:]) == 1):
            left[weight.name] = "has no kernel of more than one tap"
        elif view is None:
            left[weight.name] = f"has no units of granularity {spec.name!r}"
        elif spec.name == "n:m" and weight.shape[weight.inputs] % spec.of:
            left[weight.name] = f"sums over {weight.shape[weight.inputs]} entries, which {spec.of} does not divide"
        else:
            usable[weight] = view
    return usable


def _keeps(scores: dict[Weight, torch.Tensor], own: dict, request: Request, limits: dict, graph: Graph) -> tuple[dict[Weight, torch.Tensor], list[str]]:
    """Which entries of every weight stay, and a line for each limit."""
    spec = request.spec
    if spec.name == "n:m":
        return {weight: n_of_m(weight, spec, found) for weight, found in scores.items()}, []
    if spec.threshold is not None:
        return {weight: stays(weight, spec, gone) for weight, gone in below(scores, spec).items()}, []
    pools = ranked(scores, spec, request.scope, own)
    ratio, notes = request.ratio, []
    if limits:
        full = cost(couple(graph))

        def costs(share: float) -> dict[str, float]:
            saved = [pool.saved(share) for pool in pools]
            return {name: getattr(full, name) - sum(each[name] for each in saved) for name in limits}

        ratio = smallest(costs, limits, ratio, spec.text)
        notes = reached(costs(ratio), limits)
    gone = {weight: found for pool in pools for weight, found in pool.gone(ratio, strict=not limits and request.alone).items()}
    return {weight: stays(weight, spec, gone[weight]) for weight in scores}, notes


def _box_keeps(scores: dict[Weight, torch.Tensor], own: dict, request: Request, limits: dict, graph: Graph) -> tuple[dict[Weight, torch.Tensor], list[str]]:
    """Whole rows and columns of taps stay, the same for every filter and channel of a layer."""
    taps = {weight: found.reshape(weight.shape[2:]).cpu() for weight, found in scores.items()}
    taps = {weight: found.square() if request.score == "l2" else found for weight, found in taps.items()}
    ratio, notes = request.ratio, []
    if limits:
        full = cost(couple(graph))
        bytes_ = {weight: graph.leaves[weight.leaf].dtype.itemsize for weight in taps}

        def costs(share: float) -> dict[str, float]:
            left = {name: float(getattr(full, name)) for name in limits}
            for weight, found in taps.items():
                box = best_box(found, own.get(weight.name, min(share, 1 - 1 / found.numel())), weight.name)
                gone = math.prod(weight.shape) * (1 - math.prod(map(len, box)) / found.numel())
                each = {"params": gone, "macs": gone * weight.macs, "size": gone * bytes_[weight]}
                left = {name: value - each[name] for name, value in left.items()}
            return left

        levels = [step / found.numel() for found in taps.values() for step in range(found.numel())]
        ratio = smallest(costs, limits, ratio, request.spec.text, levels)
        notes = reached(costs(ratio), limits)
    keeps = {}
    for weight, found in taps.items():
        most = 1 - 1 / found.numel() if limits or not request.alone else 1.0
        box = best_box(found, own.get(weight.name, min(ratio, most)), weight.name)
        keeps[weight] = torch.zeros(weight.shape, dtype=torch.bool)
        keeps[weight][(slice(None), slice(None), *torch.meshgrid(*map(torch.tensor, box), indexing="ij"))] = True
    return keeps, notes


def _plan(decided: dict[Weight, tuple], left: dict[str, str], notes: list[str]) -> Plan:
    parts, cuts, lines, slow = [], {}, [*notes], False
    for weight, (keep, part, how) in decided.items():
        parts.append(part)
        if part.kind == "kernel":
            cuts[weight.leaf] = {axis: list(taps) for axis, taps in enumerate(part.data, start=2) if len(taps) < weight.shape[axis]}
        slow |= part.kind == "mask"
        count = int(keep.sum())
        lines.append(f"{weight.name}: {count} of {keep.numel()} weights stay ({1 - count / keep.numel():.2%} gone), {how}")
    lines += [f"whole: {name}: {why}" for name, why in left.items()]
    shapes = {part.name: weight.shape for weight, (_, part, _) in decided.items()}
    return Plan(cuts, shapes, (), (SLOW,) if slow else (), tuple(lines), parts=tuple(parts))
