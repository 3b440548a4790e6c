"""Scores before any training: from a few batches of an untrained network, or from none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import BadScore
from ..tracing.copies import duplicate
from ..tracing.fused import gathered
from ..tracing.trees import leaf_tensors, replace, tensors
from .data import gradient, gradients, samples
from .registry import scorer
from .task import Scores, Task

Tensor = torch.Tensor


def mean_gradient(task: Task) -> dict[str, Tensor]:
    """The gradient of the mean loss over all samples of all batches."""
    total: dict[str, Tensor] = {}
    count = 0
    for batch_gradient, n in gradients(task.data, task.parameters):
        count += n
        for name, grad in batch_gradient.items():
            total[name] = total[name].add_(grad, alpha=n) if name in total else grad * n
    return {name: grad / count for name, grad in total.items()}


@scorer("at initialisation", "sensitivity of the loss to a gate on the unit", "Lee et al. 2019 (SNIP)", needs="loss", cost="one backward pass")
def snip(task: Task, over: str = "all") -> Scores:
    """``|Σ_m g_m w_m|`` over all slices of a unit, with g the gradient of the mean loss over all batches."""
    grads, weights = mean_gradient(task), task.parameters
    return [total.abs() for total in task.total({name: grads[name] * weights[name].detach() for name in weights}, over)]


@scorer("at initialisation", "effect of the removal on the gradient flow", "Wang et al. 2020 (GraSP)", needs="loss", cost="a gradient and a Hessian product")
def grasp(task: Task, over: str = "all") -> Scores:
    """``Σ_m w_m (H g)_m``: removing a unit changes ``‖g‖²`` by ``−2 Σ w (Hg)`` to first order, so units whose removal
    raises the gradient norm most have the lowest score and go first. H and g are of the mean loss over all batches.
    """
    task.data.twice()
    flow, weights = mean_gradient(task), task.parameters
    products = {name: torch.zeros_like(grad) for name, grad in flow.items()}
    count = 0
    for batch in task.data:
        count += samples(batch)
        for name, product in hessian_times(task, batch, flow).items():
            products[name].add_(product, alpha=samples(batch))
    return task.total({name: products[name] / count * weights[name].detach() for name in weights}, over)


def hessian_times(task: Task, batch: Any, vector: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Hessian of a batch's mean loss times a vector, by a second backward pass."""
    weights = task.parameters
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # the fused kernels have no second derivative
        first = gradient(task.data, weights, batch, create_graph=True)
        with torch.enable_grad():
            dot = sum((first[name] * vector[name]).sum() for name in first if first[name].requires_grad)
        if not isinstance(dot, Tensor):
            return {name: torch.zeros_like(grad) for name, grad in vector.items()}  # a loss without curvature
        products = torch.autograd.grad(dot, list(weights.values()), allow_unused=True)
    return {name: torch.zeros_like(weights[name]) if grad is None else grad for name, grad in zip(weights, products, strict=True)}


# Where scale and shift stand among a norm's arguments, and the axis of their entries (None: the last ones).
_NORMS = {F.batch_norm: (3, 4, 1), F.instance_norm: (3, 4, 1), F.group_norm: (2, 3, 1), F.layer_norm: (2, 3, None), F.rms_norm: (2, None, None)}
_NORMS |= {torch.batch_norm: (1, 2, 1), torch.instance_norm: (1, 2, 1), torch.group_norm: (2, 3, 1), torch.layer_norm: (2, 3, None)}


class _Linear(TorchFunctionMode):
    """Norms without statistics: what is left of them is their scale and shift."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _NORMS:
            return func(*args, **kwargs)
        *places, axis = _NORMS[func]
        x = args[0] if args else kwargs["input"]
        shape = [-1 if a == axis else 1 for a in range(x.ndim)]
        for at, key, join in zip(places, ("weight", "bias"), (torch.mul, torch.add), strict=True):
            value = args[at] if at is not None and len(args) > at else kwargs.get(key)
            if value is not None:
                x = join(x, value.reshape(shape) if axis else value)
        return x


def positive_twin(model: nn.Module) -> nn.Module:
    """A float64 copy with ``|θ|`` in place of every parameter; the model's own tensors are only read."""
    memo: dict[int, Any] = {}
    for _, _, _, tensor in leaf_tensors(model):
        data = tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)
        memo.setdefault(id(tensor), nn.Parameter(data.abs_(), requires_grad=False) if isinstance(tensor, nn.Parameter) else data)
    return gathered(duplicate(model, memo)).eval()


def synaptic_flow(task: Task, twin: nn.Module) -> dict[str, Tensor]:
    """``θ ∂R/∂θ`` of the positive twin for ``R``, the sum of its outputs on an input of ones."""
    ones: Callable[[Tensor], Tensor] = lambda t: torch.ones_like(t, dtype=torch.float64) if t.is_floating_point() else t  # noqa: E731
    args, kwargs = replace(task.groups.graph.example, ones)
    weights = {n: t for n, _, _, t in leaf_tensors(twin) if n in task.parameters}
    with torch.inference_mode(False), torch.enable_grad(), _Linear():
        for tensor in weights.values():
            tensor.requires_grad_(True)
        total = sum(out.sum() for out in tensors(twin(*args, **kwargs), Tensor) if out.is_floating_point() and out.requires_grad)
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True) if isinstance(total, Tensor) else [None] * len(weights)
    if not any(grad is not None for grad in gradients):
        raise BadScore("the score 'synflow' finds no output that depends on the parameters")
    return {name: torch.zeros_like(t) if g is None else g * t.detach() for (name, t), g in zip(weights.items(), gradients, strict=True)}


@scorer("at initialisation", "synaptic flow through positive weights, in rounds", "Tanaka et al. 2020 (SynFlow)", cost="`rounds` backward passes, no data")
def synflow(task: Task, rounds: int = 10, keep: float = 0.1, over: str = "all") -> Scores:
    """``Σ_m θ_m ∂R/∂θ_m`` over all slices, ``R = 1ᵀ f(|θ|, 1)`` in float64 with norms reduced to their scale and shift.

    After round k the lowest units of the whole model are removed until ``keep^{k/rounds}`` of them are left, and the rest
    is scored again; a unit's score is the round that removed it plus its place in that round. ``rounds=1`` gives the plain
    flow; the paper uses 100.
    """
    twin = positive_twin(task.model)
    if rounds == 1:
        return task.total(synaptic_flow(task, twin), over)
    weights = {n: t for n, _, _, t in leaf_tensors(twin) if n in task.parameters}
    sizes = [group.size for group in task.groups]
    alive = torch.ones(sum(sizes), dtype=torch.bool)
    scores = torch.zeros(sum(sizes), dtype=torch.float64)
    for number in task.steps(range(1, rounds + 1)):
        flow = torch.cat(task.total(synaptic_flow(task, twin), over))
        alive_units = alive.nonzero().ravel()
        place = torch.empty(len(alive_units), dtype=torch.float64)
        place[torch.sort(flow[alive_units], descending=True, stable=True).indices] = torch.arange(len(alive_units), 0, -1, dtype=torch.float64) / (
            len(alive_units) + 1
        )
        scores[alive_units] = number + place
        count = max(round(len(alive) * keep ** (number / rounds)), 1)
        gone = alive_units[torch.sort(flow[alive_units], descending=True, stable=True).indices[count:]]
        alive[gone] = False
        _silence(task, weights, alive.split(sizes))
    return list(scores.split(sizes))


def _silence(task: Task, weights: dict[str, Tensor], alive: Any) -> None:
    with torch.no_grad():
        for group, stays in zip(task.groups, alive, strict=True):
            for name, axis, units in task.places(group):
                if name in weights:
                    index = torch.from_numpy(units)
                    mask = torch.where(index >= 0, stays[index.clamp(min=0)].double(), 1.0).to(weights[name].device)
                    weights[name].mul_(mask.reshape([-1 if a == axis else 1 for a in range(weights[name].ndim)]))
