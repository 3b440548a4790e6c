# pyright: strict, reportPrivateUsage=false
"""Batch norm folded into the layer before it: :func:`fuse`, for inference, the user's model untouched.

A norm with fixed statistics is a scale and a shift per channel, so a convolution, linear layer or transposed convolution
whose result nothing else reads can do its work. Pairs are found in the recorded graph, not by names or by order in the
module tree. It makes a model faster without pruning, so give it to both sides of a comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from ..errors import NotEqual
from ..operations.contraction import Product
from ..operations.notation import Value
from ..tracing.copies import duplicate
from ..tracing.graph import Graph
from ..tracing.node import Node, Norm
from ..tracing.origin import axis_of, source
from ..tracing.shadow import evaluating
from ..tracing.trace import trace
from ..tracing.trees import leaf_tensors, tensors


@dataclass(frozen=True)
class Pair:
    """A norm that can go: the weight it is folded into, its axis of outputs, the convolution's groups where that axis holds
    one group only (transposed), and the module that runs the norm."""

    weight: str
    bias: str
    axis: int
    groups: int
    norm: str
    scale: str | None
    shift: str | None
    mean: str
    variance: str
    eps: float


def fuse(model: nn.Module, example_input: Any, example_kwargs: dict[str, Any] | None = None) -> nn.Module:
    """A copy in eval mode that computes the same with its batch norms folded where that is exact; others stay.

    ``example_input`` is a tensor, a tuple (positional) or a dict (keyword). Raises what :func:`graphprune.trace` raises, and
    :class:`~graphprune.errors.NotEqual` when the result differs on the example (code that reads the weights of a norm).

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> print(fuse(net, torch.zeros(1, 3, 8, 8))[1])
    Identity()
    """
    graph = trace(model, example_input, example_kwargs)
    fused = evaluating(duplicate(model, {id(t): t.detach().clone() for *_, t in leaf_tensors(model) if not t.is_leaf}))
    for pair in pairs(graph, fused):
        _fold(fused, pair)
    _compare(graph, model, fused)
    return fused


def pairs(graph: Graph, model: nn.Module) -> list[Pair]:
    """The norms that can be folded: every tensor of the pair is used once, and the norm's module can do without it."""
    reads = Counter(storage for node in graph.nodes for storage in {value.storage for value in tensors((node.args, node.kwargs))})
    reads.update(value.storage for value in graph.outputs)
    matches: list[Pair] = []
    for node in graph.nodes:
        pair = _pair(graph, node, reads, model) if node.op.norm == "batch" else None
        if pair and _without(model.get_submodule(pair.norm)) is not None:
            matches.append(pair)
    return matches


def _pair(graph: Graph, call: Node, reads: Counter[Any], model: nn.Module) -> Pair | None:
    norm = call.norm
    before = graph.nodes[norm.x.node] if norm is not None and norm.x.node >= 0 else None
    product = before.product if before is not None else None
    if norm is None or before is None or product is None or reads[norm.x.storage] != 1 or not any(out is norm.x for out in before.outs):
        return None
    weight = source(graph.nodes, product.weight.value)
    if weight is None or product.out != 1 or norm.mean is None or norm.var is None or norm.training or not call.module:
        return None
    axis = axis_of(weight, product.weight.value, product.weight.made[0])
    if axis is None or not _once(graph, reads, weight, product.weight.value, [product.bias, norm.weight, norm.bias, norm.mean, norm.var]):
        return None
    path = weight.leaf.rpartition(".")[0]
    if product.bias is None and model.get_submodule(path)._parameters.get("bias", 0) is not None:
        return None  # nowhere to put the shift
    return _folding(path, weight, axis, product, norm, call.module)


def _folding(path: str, weight: Value, axis: int, product: Product, norm: Norm, module: str) -> Pair:
    """The names of what is folded; ``path`` is the layer of the weight, ``module`` that of the norm."""
    assert norm.mean is not None and norm.var is not None
    # Where the outputs of a group stand alone (transposed), the groups lie along the other axis.
    groups = product.groups if len(product.weight.axes[product.weight.made[0]]) == 1 else 1
    scale, shift = (value.leaf if value is not None else None for value in (norm.weight, norm.bias))
    bias = product.bias.leaf if product.bias is not None else f"{path}.bias".lstrip(".")
    return Pair(weight.leaf, bias, axis, groups, module, scale, shift, norm.mean.leaf, norm.var.leaf, norm.eps)


def _once(graph: Graph, reads: Counter[Any], weight: Value, operand: Value, others: list[Value | None]) -> bool:
    """Whether all tensors of a pair are the model's own and used nowhere else; a weight is read by each movement up to its product too."""
    moves, value = 0, operand
    while value is not weight:
        moves, value = moves + 1, graph.nodes[value.node].held[0]
    every = [(weight, 1 + moves), *((value, 1) for value in others if value is not None)]
    return all(value.leaf and value.leaf[0] != "<" and reads[value.storage] <= most for value, most in every)


def _without(module: nn.Module) -> nn.Module | None:
    """What stands in for a norm's module once the norm is gone; None where its code cannot be recorded."""
    if cast(Any, module)._forward_hooks or cast(Any, module)._forward_pre_hooks:
        return None
    if type(module).forward is nn.modules.batchnorm._BatchNorm.forward:
        return nn.Identity().eval()

    class Shallow(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    try:
        graph = Shallow().trace(module)
    except Exception:
        return None
    norms = [node for node in graph.nodes if node.op == "call_function" and node.target in (nn.functional.batch_norm, torch.batch_norm)]
    if len(norms) != 1:
        return None
    norms[0].replace_all_uses_with(norms[0].args[0] if norms[0].args else norms[0].kwargs["input"])
    graph.erase_node(norms[0])
    rest = fx.GraphModule(module, graph)
    rest.graph.eliminate_dead_code()
    rest.recompile()
    return rest.eval()


@torch.no_grad()
def _fold(model: nn.Module, pair: Pair) -> None:
    leaves = {name: tensor for name, _, _, tensor in leaf_tensors(model)}
    path, _, name = pair.weight.rpartition(".")
    layer, weight, bias = model.get_submodule(path), leaves[pair.weight], leaves.get(pair.bias)
    read: Callable[[str | None, torch.Tensor], torch.Tensor] = lambda name, default: default if name is None else leaves[name].double()  # noqa: E731
    mean = leaves[pair.mean].double()
    factor = read(pair.scale, torch.ones_like(mean)) / torch.sqrt(leaves[pair.variance].double() + pair.eps)
    shift = read(pair.shift, torch.zeros_like(mean)) + ((0 if bias is None else bias.double()) - mean) * factor
    if pair.axis == 0:
        each = factor.reshape(-1, *[1] * (weight.ndim - 1))
    else:  # (inputs, outputs of one group, …): the outputs of a group belong to its own inputs
        each = factor.reshape(pair.groups, 1, -1).expand(-1, weight.shape[0] // pair.groups, -1).reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    layer._parameters[name] = nn.Parameter((weight.double() * each).to(weight.dtype), weight.requires_grad)
    where, _, name = pair.bias.rpartition(".")
    model.get_submodule(where)._parameters[name] = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    parent, _, name = pair.norm.rpartition(".")
    model.get_submodule(parent)._modules[name] = _without(model.get_submodule(pair.norm))


def _compare(graph: Graph, model: nn.Module, fused: nn.Module) -> None:
    args, kwargs = graph.example
    twin = evaluating(duplicate(model, {id(tensor): tensor for *_, tensor in leaf_tensors(model)}))
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            wanted = list(tensors(twin(*args, **kwargs), torch.Tensor))
            results = list(tensors(fused(*args, **kwargs), torch.Tensor))
    except Exception as error:
        raise NotEqual(f"the fused model does not run on the example: {type(error).__name__}: {error}; fuse its parts, or leave it") from error
    finally:
        torch.set_rng_state(state)
    for result, theirs in zip(results, wanted, strict=True):
        if theirs.is_floating_point() and theirs.numel() and not theirs.is_meta:
            gap = float((result.double() - theirs.double()).abs().max()) / (float(theirs.double().abs().max()) or 1.0)
            if gap > {torch.float64: 1e-8, torch.float32: 1e-3}.get(theirs.dtype, 5e-2):
                raise NotEqual(f"the fused model differs by {gap:.1e} (relative): its code uses the weights of a norm elsewhere; fuse its parts, or leave it")
