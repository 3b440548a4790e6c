"""The weights whose entries can be pruned, read from the graph: operands of convolutions and matrix products.

A parameter counts when movements alone (a transpose, a view), or a mask of ours, lie between it and the product. Which of
its axes the product sums over is read from its labels, so it does not matter how a module stores its weight.

>>> from ..tracing.trace import trace
>>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> [(w.name, w.inputs) for w in weights(trace(net, torch.zeros(1, 4)), net)[0]]
[('0.weight', 1), ('2.weight', 1)]
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import torch
from torch import nn

from ..cost import macs_by_call
from ..cutting.kernels import Thin
from ..cutting.masks import mask_of, masked, parameter_name, parametrizations
from ..operations.contraction import Operand
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.node import Node
from ..tracing.origin import axis_of
from ..tracing.trees import leaf_tensors, tensors

RECURRENT = "belongs to a recurrent layer, which reads its weights all at once"


@dataclass(frozen=True)
class Weight:
    """A parameter that a product multiplies with.

    ``name`` as the user knows it, ``leaf`` as the graph does (they differ when it is masked); ``inputs``: the axis summed
    over; ``kernel``: how many of the last axes are a convolution's kernel; ``call``: the first product's place in ``graph.nodes``;
    ``macs``: how often each of its entries is multiplied with in one run on the example.
    """

    name: str
    leaf: str
    shape: tuple[int, ...]
    inputs: int
    kernel: int
    groups: int
    call: int
    macs: float = field(default=0.0, compare=False)
    mask: torch.Tensor | None = field(default=None, compare=False)


def weights(graph: Graph, model: nn.Module) -> tuple[list[Weight], dict[str, str]]:
    """All such weights in order of use, and for every other candidate the reason why its entries stay."""
    leaves = {leaf: (module, tensor) for leaf, module, _, tensor in leaf_tensors(model)}
    tied = _tied(leaves)
    masks = masked(model)
    usable: dict[str, Weight] = {}
    whole: dict[str, str] = {}
    macs, spent = macs_by_call(graph), defaultdict(float)
    for index, node in enumerate(graph.nodes):
        for operand in _operands(node):
            leaf, anchor = source(graph, operand.value, masks)
            spent[leaf] += macs[index]
            module, tensor = leaves.get(leaf or "", (None, None))
            if leaf is None or leaf in usable or leaf in whole or module is None or not _prunable(tensor):
                continue
            inputs = axis_of(anchor, operand.value, operand.summed[0])
            reason = f"is tied to {tied[leaf]}" if leaf in tied else _unfit(module, inputs)
            if reason or inputs is None:
                whole[leaf] = reason
                continue
            name, shape = parameter_name(leaf), tuple(tensor.shape)
            usable[leaf] = Weight(name, leaf, shape, inputs, len(operand.taps), node.products[0].groups, index, 0.0, masks.get(name))
    whole |= _parametrised(model)
    for leaf, (module, tensor) in leaves.items():
        if isinstance(tensor, nn.Parameter) and tensor.ndim > 1 and leaf not in usable and "parametrizations." not in leaf:
            whole.setdefault(leaf, RECURRENT if isinstance(module, nn.RNNBase) else "is no operand of a product")
    return [replace(weight, macs=spent[leaf] / math.prod(weight.shape)) for leaf, weight in usable.items()], whole


def _tied(leaves: Mapping[str, tuple[nn.Module, torch.Tensor]]) -> dict[str, str]:
    """Another name of the tensors that have several."""
    names: dict[int, list[str]] = defaultdict(list)
    for leaf, (_, tensor) in leaves.items():
        names[id(tensor)].append(leaf)
    return {leaf: next(other for other in several if other != leaf) for several in names.values() if len(several) > 1 for leaf in several}


def _parametrised(model: nn.Module) -> dict[str, str]:
    """The weights that are made by something else than our masks, and that they are."""
    return {
        f"{prefix}.{name}".lstrip("."): f"is already parametrised ({type(steps[-1]).__name__}): remove_parametrizations first"
        for prefix, module in model.named_modules()
        for name, steps in parametrizations(module).items()
        if mask_of(module, name) is None
    }


def _prunable(tensor: object) -> TypeGuard[nn.Parameter]:
    return isinstance(tensor, nn.Parameter) and tensor.ndim > 1 and tensor.is_floating_point()


def _unfit(module: nn.Module, inputs: int | None) -> str:
    """Why the entries of a weight cannot be chosen, by the module that holds it and the axis that is summed over; nothing where they can."""
    if isinstance(module, Thin):
        return "is a product of gathered columns already"
    if isinstance(module, nn.RNNBase):
        return RECURRENT
    return "is summed over several of its axes at once" if inputs is None else ""


def _operands(node: Node) -> tuple[Operand, ...]:
    """The tensors that may be weights of a product: with a kernel only one of them is, else any that is summed over one of its axes."""
    if node.product is None:
        return ()
    operands = (node.product.weight,) if node.product.weight.taps else node.product.operands
    return tuple(operand for operand in operands if len(operand.summed) == 1)


def source(graph: Graph, value: Value, masks: dict[str, torch.Tensor]) -> tuple[str | None, Value]:
    """The leaf that a tensor of the run is, seen through movements and our own masks; and the last value that has the leaf's axes."""
    anchor = None
    while not value.leaf:
        if value.node < 0:
            return None, value
        node = graph.nodes[value.node]
        operands = list(tensors((node.args, node.kwargs)))
        if node.op.chooses and len(operands) > 1 and _masks(operands[0].leaf, masks):
            anchor, value = value, operands[1]
        elif node.is_move and len(operands) == 1:
            value = operands[0]
        else:
            return None, value
    return value.leaf, anchor or value


def _masks(leaf: str, masks: dict[str, torch.Tensor]) -> bool:
    path, inside, rest = leaf.rpartition("parametrizations.")
    return bool(inside) and path + rest.partition(".")[0] in masks
