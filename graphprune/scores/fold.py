"""Batch norms folded into their producers, for scoring: the weights of the same function without batch norm.

``K̃_c = γ_c/σ_c · K_c`` and ``b̃_c = β_c + γ_c/σ_c (b_c − μ_c)``. A norm of these does not change when a filter is rescaled
and the statistics follow; the product of producer and consumer norms does not change either when γ, β are rescaled and
the next layer's columns undo it.
"""

from __future__ import annotations

import torch

from ..coupling.groups import Group
from ..errors import BadScore
from ..operations.notation import Value
from ..tracing.node import Norm
from ..tracing.origin import axis_of, source
from ..tracing.trace import Graph
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
    graph, held = task.groups.graph, task.tensors
    shifts: set[str] = set()
    done: set[str] = set()
    found: dict[str, Tensor] = {name: tensor.detach() for name, tensor in task.parameters.items()}
    for norm in batch_norms(graph):
        maker = graph.nodes[norm.x.node] if norm.x.node >= 0 else None
        product = maker.product if maker is not None else None
        leaf = source(graph.nodes, product.weight.value) if product is not None else None
        if product is None or leaf is None or product.out != 1:
            continue
        weight, bias = leaf.leaf, _name(product.bias)
        gamma, beta, mean, var = (_name(value) for value in (norm.weight, norm.bias, norm.mean, norm.var))
        if weight not in held or mean not in held or held[weight].is_meta or weight in done:
            continue
        scale = (held[var].detach().double() + norm.eps).rsqrt() * (held[gamma].detach().double() if gamma else 1.0)
        shift = (held[bias].detach().double() if bias else 0.0) - held[mean].detach().double()
        axis = axis_of(leaf, product.weight.value, product.weight.made[0])
        if axis is None or held[weight].shape[axis] != len(scale):
            continue
        done.add(weight)
        shifts.add(beta or mean)
        found[weight] = held[weight].detach().double() * scale.reshape([-1 if a == axis else 1 for a in range(held[weight].ndim)])
        found.pop(gamma, None)
        found.pop(bias, None)
        found[beta or mean] = scale * shift + (held[beta].detach().double() if beta else 0.0)
    return found, shifts


def product_norm(task: Task) -> Scores:
    """``‖P̃_c‖₂ · ‖W_c‖₂`` of folded weights."""
    weights, shifts = _fold(task)
    sides = [task.slices(weights, over, by=torch.square) for over in ("produces", "consumes")]
    biases = task.slices({name: weights[name] for name in shifts}, "passes", by=torch.square)
    found = []
    for group, made, used, moved in zip(task.groups, *sides, biases, strict=True):
        factors = [torch.stack(parts).sum(0).sqrt() for parts in (made + moved, used) if parts]
        found.append(torch.stack(factors).prod(0) if factors else torch.zeros(group.size, dtype=torch.float64))
    return found


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


def lacking(task: Task, found: list[Tensor | None], otherwise: str | None, name: str, what: str) -> Scores:
    """Fill the groups that lack what is measured by another score, or say which they are."""
    missing = [group for group, scores in zip(task.groups, found, strict=True) if scores is None]
    if not missing:
        return [scores for scores in found if scores is not None]
    if otherwise is None:
        names = ", ".join(group.name for group in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise BadScore(
            f"the score {name!r} measures {what}, and {len(missing)} of {len(found)} groups have none ({names}); "
            f"name a score for those, graphprune.scores.{name}.with_(otherwise='l2'), or keep= them"
        )
    spare = task.by(otherwise)
    return [spare[i] if mine is None else mine for i, mine in enumerate(found)]


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
    found: list[Tensor | None] = []
    for group, parts in zip(task.groups, kernels, strict=True):
        scales = _scales(task, group)
        found.append(torch.stack(scales).sum(0) * torch.stack(parts).sum(0) if scales and parts else None)
    return lacking(task, found, otherwise, "synaptic", "a batch-norm scale and the kernels it feeds")
