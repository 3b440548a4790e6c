"""Batch norms folded into their producers, for scoring: the weights of the same function without batch norm.

``K̃_c = γ_c/σ_c · K_c`` and ``b̃_c = β_c + γ_c/σ_c (b_c − μ_c)``. A norm of these does not change when a filter is rescaled
and the statistics follow; the product of producer and consumer norms does not change either when γ, β are rescaled and
the next layer's columns undo it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..coupling.groups import Group
from ..errors import BadScore
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.node import Norm
from ..tracing.origin import axis_of, source
from .registry import scorer
from .task import Scores, Task

Tensor = torch.Tensor


def batch_norms(graph: Graph) -> list[Norm]:
    """The recorded batch norms, in the order of the run."""
    return [norm for node in graph.nodes if (norm := node.norm) is not None and norm.kind == "batch"]


def _name(value: Value | None) -> str:
    return value.leaf if value is not None else ""


def folded(task: Task) -> dict[str, Tensor]:
    """The parameters with every batch norm that directly follows a convolution or a linear layer folded into it.

    γ disappears; the folded bias stands in β's place (the running mean's, where there is no β).
    """
    return _fold(task)[0]


def _fold(task: Task) -> tuple[dict[str, Tensor], set[str]]:
    """The folded parameters, and the names under which folded biases stand."""
    parameters: dict[str, Tensor] = {name: tensor.detach() for name, tensor in task.parameters.items()}
    shifts: set[str] = set()
    done: set[str] = set()
    for norm in batch_norms(task.groups.graph):
        pair = _pair(task, norm)
        if pair is None or pair.weight in done:
            continue
        done.add(pair.weight)
        shifts.add(pair.shift)
        tensors = {name: task.tensors[name].detach().double() for name in pair.names}
        weight = tensors[pair.weight]
        scale = (tensors[pair.var] + norm.eps).rsqrt() * (tensors[pair.gamma] if pair.gamma else 1.0)
        shift = (tensors[pair.bias] if pair.bias else 0.0) - tensors[pair.mean]
        parameters[pair.weight] = weight * scale.reshape([-1 if axis == pair.axis else 1 for axis in range(weight.ndim)])
        parameters.pop(pair.gamma, None)
        parameters.pop(pair.bias, None)
        parameters[pair.shift] = scale * shift + (tensors[pair.beta] if pair.beta else 0.0)
    return parameters, shifts


class _Pair(NamedTuple):
    """A product and the batch norm behind it, by the names of their tensors ("" where there is none), and the axis of the weight that is normalised."""

    weight: str
    axis: int
    bias: str
    gamma: str
    beta: str
    mean: str
    var: str

    @property
    def names(self) -> list[str]:
        return [name for name in (self.weight, self.bias, self.gamma, self.beta, self.mean, self.var) if name]

    @property
    def shift(self) -> str:
        """The name under which the folded bias stands."""
        return self.beta or self.mean


def _pair(task: Task, norm: Norm) -> _Pair | None:
    """The product right before a batch norm, where the one can be folded into the other."""
    graph, tensors = task.groups.graph, task.tensors
    maker = graph.nodes[norm.x.node] if norm.x.node >= 0 else None
    product = maker.product if maker is not None else None
    leaf = source(graph.nodes, product.weight.value) if product is not None else None
    if product is None or leaf is None or product.out != 1:
        return None
    mean, var = _name(norm.mean), _name(norm.var)
    if leaf.leaf not in tensors or mean not in tensors or tensors[leaf.leaf].is_meta:
        return None
    axis = axis_of(leaf, product.weight.value, product.weight.made[0])
    if axis is None or tensors[leaf.leaf].shape[axis] != len(tensors[var]):
        return None
    return _Pair(leaf.leaf, axis, _name(product.bias), _name(norm.weight), _name(norm.bias), mean, var)


def product_norm(task: Task) -> Scores:
    """``‖P̃_c‖₂ · ‖W_c‖₂`` of folded weights."""
    weights, shifts = _fold(task)
    sides = [task.slices(weights, over, by=torch.square) for over in ("produces", "consumes")]
    biases = task.slices({name: weights[name] for name in shifts}, "passes", by=torch.square)
    scores = []
    for group, made, used, moved in zip(task.groups, *sides, biases, strict=True):
        factors = [torch.stack(parts).sum(0).sqrt() for parts in (made + moved, used) if parts]
        scores.append(torch.stack(factors).prod(0) if factors else torch.zeros(group.size, dtype=torch.float64))
    return scores


def _scales(task: Task, group: Group) -> list[Tensor]:
    """``|γ|`` of every batch norm that passes a group's units, as (units,) tensors."""
    gammas = {norm.weight.leaf for norm in batch_norms(task.groups.graph) if norm.weight is not None}
    parts = []
    for name, _, units in task.places(group, "passes"):
        if name in gammas:
            index = torch.from_numpy(units)
            size = task.tensors[name].detach().double().abs().cpu()
            parts.append(torch.zeros(group.size, dtype=torch.float64).index_add_(0, index[index >= 0], size[index >= 0]))
    return parts


def lacking(task: Task, measured: list[Tensor | None], otherwise: str | None, name: str, what: str) -> Scores:
    """Fill the groups that lack what is measured by another score, or say which they are."""
    missing = [group for group, scores in zip(task.groups, measured, strict=True) if scores is None]
    if not missing:
        return [scores for scores in measured if scores is not None]
    if otherwise is None:
        names = ", ".join(group.name for group in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise BadScore(
            f"the score {name!r} measures {what}, and {len(missing)} of {len(measured)} groups have none ({names}); "
            f"name a score for those, graphprune.scores.{name}.with_(otherwise='l2'), or keep= them"
        )
    spare = task.by(otherwise)
    return [spare[index] if scores is None else scores for index, scores in enumerate(measured)]


@scorer("norm", "absolute scale of the batch norms that pass the unit", "Liu et al. 2017 (network slimming)", cost="reads the scales only")
def bn_scale(task: Task, otherwise: str | None = None) -> Scores:
    """``|γ_c|``, summed over the batch norms of a group; ``otherwise`` names the score of groups without batch norm."""
    scales = [_scales(task, group) for group in task.groups]
    return lacking(task, [torch.stack(parts).sum(0) if parts else None for parts in scales], otherwise, "bn_scale", "batch-norm scales")


@scorer("norm", "batch-norm scale times the norms of the kernels it feeds", "Lin et al. 2018 (synaptic strength)", cost="one pass over the consumers")
def synaptic(task: Task, otherwise: str | None = None) -> Scores:
    """``Σ_o |γ_c| · ‖W_oc‖_F`` over the kernels that read channel c; unchanged by both rescaling symmetries.

    Where several batch norms (or consumers) share a group, their scales (their kernel norms) are summed first.
    """
    kernels = task.slices(task.parameters, "consumes", by=lambda w: w.flatten(2).norm(dim=2) if w.ndim > 2 else w.abs())
    strengths: list[Tensor | None] = []
    for group, parts in zip(task.groups, kernels, strict=True):
        scales = _scales(task, group)
        strengths.append(torch.stack(scales).sum(0) * torch.stack(parts).sum(0) if scales and parts else None)
    return lacking(task, strengths, otherwise, "synaptic", "a batch-norm scale and the kernels it feeds")
