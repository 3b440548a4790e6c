"""What scores of entries need besides the weights: gradients of the loss, and the batch-norm scale before a weight.

>>> from ..tracing.trace import trace
>>> from .weights import weights
>>> net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
>>> graph = trace(net, torch.zeros(1, 2, 3, 3))
>>> scale_of(graph, weights(graph, net)[0][1], dict(net.named_parameters())).tolist()
[1.0, 1.0, 1.0, 1.0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import NeedsBatches
from ..operations.notation import Value
from ..scores.data import Data, undisturbed
from ..scores.data import gradients as data_gradients
from ..scores.registry import without_data
from ..tracing.graph import Graph
from ..tracing.trees import leaf_tensors, tensors
from .entries import unit_scores
from .weights import Weight


def scored(
    graph: Graph, model: nn.Module, usable: Mapping[Weight, tuple[Any, ...]], criterion: Any, batches: Iterable[Any] | None, loss: Callable[..., Any] | None
) -> dict[Weight, torch.Tensor]:
    """The scores of the units of every weight; ``usable`` says how each is seen as units (:func:`~graphprune.entries.views`)."""
    grads = gradients(model, list(usable), batches, loss) if criterion == "taylor" else {}
    data = {leaf: tensor for leaf, _, _, tensor in leaf_tensors(model)}
    scores = {}
    for weight, view in usable.items():
        gamma = scale_of(graph, weight, data) if criterion == "synaptic" else None
        tensor = data[weight.leaf] if weight.mask is None else data[weight.leaf].detach() * weight.mask
        scores[weight] = unit_scores(weight, view, tensor, criterion, grads.get(weight), gamma)
    return scores


def gradients(model: nn.Module, wanted: Sequence[Weight], batches: Iterable[Any] | None, loss: Callable[..., Any] | None) -> dict[Weight, torch.Tensor]:
    """The mean gradient of the loss over all samples of the batches; the model and its ``.grad`` are left as they were."""
    if batches is None:
        raise NeedsBatches(without_data("taylor", "loss"))
    leaves = {leaf: tensor for leaf, _, _, tensor in leaf_tensors(model)}
    data, total, count = Data(model, batches, loss, name="taylor"), {}, 0
    with undisturbed(model):
        for gradient, size in data_gradients(data, {weight.leaf: leaves[weight.leaf] for weight in wanted}):
            total = {leaf: total.get(leaf, 0) + grad * size for leaf, grad in gradient.items()}
            count += size
    return {weight: total[weight.leaf] / count for weight in wanted}


def scale_of(graph: Graph, weight: Weight, data: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The batch-norm scale of each channel a weight reads, when one stands before it with only pointwise steps between."""
    product = graph.nodes[weight.call].product
    value = product.input.value if product is not None else None
    while isinstance(value, Value) and value.node >= 0:
        node = graph.nodes[value.node]
        norm = node.norm
        if norm is not None and norm.kind == "batch":
            gamma = data.get(norm.weight.leaf) if norm.weight is not None else None
            if gamma is None or gamma.numel() != weight.shape[weight.inputs] or weight.groups != 1:
                return None
            return gamma.detach()
        operands = list(tensors((node.args, node.kwargs)))
        one = len(operands) == 1 and len(operands[0].shape) == len(value.shape) and operands[0].shape[1:2] == value.shape[1:2]
        if not one or not (node.is_move or node.op.pools or node.is_pointwise):
            return None
        value = operands[0]
    return None
