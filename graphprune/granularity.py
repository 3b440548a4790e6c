"""How coarsely to prune: the textbook's names, and :func:`finer`, which plans everything but channels and heads.

>>> parse("2:4").keep, parse("vector:column").option
(2, 'column')
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .catalogue import register
from .depth import plan_depth
from .entries import ENTRYWISE, Spec, check_criterion, choose, n_of_m, stays, unit_scores, views
from .errors import BadRatio, NeedsBatches, NothingToPrune, UnknownName
from .notation import Value
from .parts import Part, pack
from .plan import Plan
from .positions import best_box, realise
from .rules import RULES
from .scores import Score
from .scores.data import Data, undisturbed
from .scores.data import gradients as data_gradients
from .trace import Graph, is_pointwise
from .trees import leaf_tensors, tensors
from .weights import THROUGH, Weight, weights

NAMES = {
    "channel": "whole channels and every slice coupled to them: dense and smaller (the default)",
    "head": "attention heads alone; every other axis stays: dense and smaller",
    "block": "whole residual blocks and elements of chains: the modules are gone",
    "layer": "residual branches and hidden layers of a chain: the modules are gone",
    "group": "the same (channel, tap) pairs in every filter: a smaller kernel, a thinner product where measured faster, else masked",
    "group:box": "whole rows and columns of every kernel of a layer: a smaller dense kernel",
    "kernel": "one filter x one input channel: masked",
    "vector": "rows of kernels (vector:column: columns): masked",
    "weight": "single weights by ratio, or by a threshold on the score (weight:0.01): masked",
    "n:m": "n of every m neighbours stay, as in 2:4: masked; CUDA has kernels for 2:4 (semi_structured)",
}
for _name, _line in NAMES.items():
    register("granularity", _name, _line)
OPTIONS = {"group": ("box",), "vector": ("row", "column")}
WHOLE = "stays whole at this ratio"
SLOW = "note: masked entries are stored and multiplied as zeros: stock hardware will not run the model faster for them"


def parse(granularity: str) -> Spec:
    """Read a granularity; raises :class:`~graphprune.errors.UnknownName` (with the nearest name) or BadRatio for an odd n:m."""
    if not isinstance(granularity, str):
        raise UnknownName(f"granularity is {granularity!r}; it is one of {', '.join(NAMES)}")
    pair = re.fullmatch(r"(\d+):(\d+)", granularity)
    if pair:
        keep, of = int(pair[1]), int(pair[2])
        if not 0 < keep < of:
            raise BadRatio(f"{granularity} is no n:m sparsity: n of every m entries stay, with 0 < n < m, as in 2:4")
        return Spec("n:m", granularity, keep, of)
    name, colon, option = granularity.partition(":")
    number = colon and name in ("weight", "kernel", "vector") and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", option)
    if name not in NAMES or name == "n:m" or (colon and option not in OPTIONS.get(name, ()) and not number):
        near = difflib.get_close_matches(granularity, [*NAMES, "2:4"], 1, 0.3)
        raise UnknownName(f"no granularity {granularity!r}; {f'the nearest is {near[0]!r}; ' if near else ''}there are {', '.join(NAMES)}")
    return Spec(name, option)


def finer(
    graph: Graph,
    model: nn.Module,
    spec: Spec,
    ratio: float,
    *,
    criterion: Any = "l2",
    scope: str = "layer",
    keep: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    batches: Iterable | None = None,
    loss: Callable | None = None,
) -> Plan:
    """The plan for a granularity other than channels and heads; ``keep`` and ``ratios`` name tensors."""
    criterion = criterion.name if isinstance(criterion, Score) else criterion
    if scope not in ("layer", "global", "isomorphic"):
        raise BadRatio(f"scope is {scope!r}; it is 'layer', 'global' or 'isomorphic'")
    if spec.name in ("layer", "block"):
        return plan_depth(graph, model, spec.name, ratio, criterion=criterion, keep=keep, ratios=ratios or {}, batches=batches, loss=loss)
    check_criterion(criterion, ENTRYWISE)
    found, left = weights(graph, model)
    mine = [weight for weight in found if weight.leaf not in keep and weight.name not in keep]
    own = {weight.name: ratios[weight.leaf] for weight in mine if ratios and weight.leaf in ratios}
    left |= {weight.name: "kept on request" for weight in found if weight not in mine}
    if spec.name == "group" and spec.option == "box":
        decided = _boxes(mine, left, graph, model, ratio, own, criterion, batches, loss)
    else:
        decided = _entries(mine, left, graph, model, spec, ratio, own, scope, criterion, batches, loss)
    if not decided and WHOLE not in left.values():
        rows = "\n".join(f"  {name} {why}" for name, why in list(left.items())[:8])
        raise NothingToPrune(f"no weight of this model can be pruned with granularity {spec.text!r}" + (f":\n{rows}" if rows else ""))
    return _plan(decided, left)


def _entries(
    mine: list, left: dict, graph: Graph, model: nn.Module, spec: Spec, ratio: float, own: dict, scope: str, criterion: Any, batches: Any, loss: Any
) -> dict:
    """Masks (or what the positions of a group become) for single weights, vectors, kernels, groups and n:m."""
    shaped = Spec("weight") if spec.name == "n:m" else spec
    usable = {weight: views(weight, shaped) for weight in mine}
    left |= {weight.name: f"has no units of granularity {spec.name!r}" for weight, view in usable.items() if view is None}
    if spec.name == "n:m":
        odd = [weight for weight in mine if weight.shape[weight.inputs] % spec.of]
        left |= {w.name: f"sums over {w.shape[w.inputs]} entries, which {spec.of} does not divide" for w in odd}
        usable = {weight: view for weight, view in usable.items() if weight not in odd}
    usable = {weight: view for weight, view in usable.items() if view is not None}
    grads = gradients(model, list(usable), batches, loss) if criterion == "taylor" else {}
    data = {leaf: tensor for leaf, _, _, tensor in leaf_tensors(model)}
    scores = {}
    for weight, view in usable.items():
        gamma = scale_of(graph, weight, data) if criterion == "synaptic" else None
        tensor = data[weight.leaf] if weight.mask is None else data[weight.leaf].detach() * weight.mask
        scores[weight] = unit_scores(weight, view, tensor, criterion, grads.get(weight), gamma)
    if spec.name == "n:m":
        return {
            weight: (Part("mask", weight.name, pack(keep)), keep, "masked") for weight in usable if (keep := n_of_m(weight, spec, scores[weight])) is not None
        }
    decided = {}
    for weight, gone in choose(scores, spec, ratio, scope, own).items():
        keep = stays(weight, spec, gone)
        if spec.name == "group" and not keep.all():
            decided[weight] = (*_realised(weight, keep, graph, model),)
        elif not keep.all() or weight.mask is not None:
            decided[weight] = (Part("mask", weight.name, pack(keep)), keep, "masked")
        else:
            left[weight.name] = WHOLE
    return decided


def _realised(weight: Weight, keep: torch.Tensor, graph: Graph, model: nn.Module) -> tuple:
    part, line = realise(weight, keep, graph, model)
    return part, keep, line


def _boxes(mine: list, left: dict, graph: Graph, model: nn.Module, ratio: float, own: dict, criterion: Any, batches: Any, loss: Any) -> dict:
    """Smaller kernels: rows and columns, the same for every filter and channel of a layer."""
    decided = {}
    usable = [weight for weight in mine if weight.kernel and weight.inputs == 1 and torch.Size(weight.shape[2:]).numel() > 1]
    left |= {weight.name: "has no kernel of more than one tap" for weight in mine if weight not in usable}
    grads = gradients(model, usable, batches, loss) if criterion == "taylor" else {}
    data = {leaf: tensor for leaf, _, _, tensor in leaf_tensors(model)}
    for weight in usable:
        scores = unit_scores(weight, (weight.shape, (0, 1)), data[weight.leaf], criterion, grads.get(weight), None)
        taps = scores.reshape(weight.shape[2:]).cpu()
        box = best_box(taps.square() if criterion == "l2" else taps, own.get(weight.name, ratio), weight.name)
        keep = torch.zeros(weight.shape, dtype=torch.bool)
        keep[(slice(None), slice(None), *torch.meshgrid(*map(torch.tensor, box), indexing="ij"))] = True
        if keep.all():
            left[weight.name] = WHOLE
        else:
            decided[weight] = _realised(weight, keep, graph, model)
    return decided


def _plan(decided: dict[Weight, tuple], left: dict[str, str]) -> Plan:
    parts, cuts, lines, slow = [], {}, [], False
    for weight, (part, keep, how) in decided.items():
        parts.append(part)
        if part.kind == "kernel":
            cuts[weight.leaf] = {axis: list(taps) for axis, taps in enumerate(part.data, start=2) if len(taps) < weight.shape[axis]}
        slow |= part.kind == "mask"
        count = int(keep.sum())
        lines.append(f"{weight.name}: {count} of {keep.numel()} weights stay ({1 - count / keep.numel():.2%} gone), {how}")
    lines += [f"whole: {name}: {why}" for name, why in left.items()]
    shapes = {part.name: weight.shape for weight, (part, *_) in decided.items()}
    return Plan(cuts, shapes, (), (SLOW,) if slow else (), tuple(lines), parts=tuple(parts))


def gradients(model: nn.Module, wanted: list[Weight], batches: Iterable | None, loss: Callable | None) -> dict[Weight, torch.Tensor]:
    """The mean gradient of the loss over all samples of the batches; the model and its ``.grad`` are left as they were."""
    if batches is None:
        raise NeedsBatches("the score 'taylor' needs data and a loss; give batches= (any iterable of batches) and loss=")
    held = {leaf: tensor for leaf, _, _, tensor in leaf_tensors(model)}
    data, total, count = Data(model, batches, loss, name="taylor"), {}, 0
    with undisturbed(model):
        for found, size in data_gradients(data, {weight.leaf: held[weight.leaf] for weight in wanted}):
            total = {leaf: total.get(leaf, 0) + grad * size for leaf, grad in found.items()}
            count += size
    return {weight: total[weight.leaf] / count for weight in wanted}


def scale_of(graph: Graph, weight: Weight, data: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The batch-norm scale of each channel a weight reads, when one stands before it with only pointwise steps between."""
    value = graph.nodes[weight.call].args[0]
    while isinstance(value, Value) and value.node >= 0:
        node = graph.nodes[value.node]
        name = node.func._schema.name.rpartition("::")[2]
        if name in ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"):
            gamma = data.get(node.args[1].leaf) if isinstance(node.args[1], Value) else None
            fits = gamma is not None and gamma.numel() == weight.shape[weight.inputs] and weight.groups == 1
            return gamma.detach() if fits else None
        given = list(tensors((node.args, node.kwargs)))
        one = len(given) == 1 and len(given[0].shape) == len(value.shape) and given[0].shape[1:2] == value.shape[1:2]
        pooled = name in RULES and "pool" in name
        if not one or not (name in THROUGH or pooled or torch.Tag.pointwise in node.func.tags or is_pointwise(node.func, name)):
            return None
        value = given[0]
    return None
