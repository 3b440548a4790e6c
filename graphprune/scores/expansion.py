"""First and second order in the weights: what the loss would change if all slices of a unit became zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..errors import BadLoss, UnknownName
from .data import Data, gradient, gradients, one_by_one, samples
from .registry import scorer
from .start import hessian_times
from .task import Scores, Task


@scorer("first order", "squared first-order change of the loss, joint over the slices", "Molchanov et al. 2019", needs="loss", cost="one backward pass")
def taylor(task: Task, over: str = "all") -> Scores:
    """``(Σ_m g_m w_m)²`` over all slices of a unit, averaged over the batches.

    With ``over="consumes"`` the sum equals ``Σ a ∂L/∂a`` of the activation that the consumers read.
    """
    weights = task.parameters
    total, count = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups], 0
    for grads, _ in gradients(task.data, weights):
        count += 1
        joint = task.total({name: grads[name] * weights[name].detach() for name in weights}, over)
        total = [before + now.square() for before, now in zip(total, joint, strict=True)]
    return [sums / count for sums in total]


@scorer("second order", "diagonal Fisher information times squared weights", "Theis et al. 2018", needs="loss", cost="one backward pass for each sample")
def fisher(task: Task, over: str = "all") -> Scores:
    """``½ Σ_m E_n[g_{n,m}²] w_m²`` with the gradient of every sample by itself: a batch's mean gradient would vanish at a minimum."""
    weights = task.parameters
    total, count = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups], 0
    for batch in task.data:
        for one in one_by_one(batch):
            count += 1
            grads = gradient(task.data, weights, one)
            joint = task.total({name: grads[name] * weights[name].detach() for name in weights}, over, by=torch.square)
            total = [before + now for before, now in zip(total, joint, strict=True)]
    return [sums / (2 * count) for sums in total]


@scorer("second order", "diagonal of the Hessian times squared weights", "LeCun et al. 1990 (OBD)", needs="loss", cost="`probes` backward passes a batch")
def obd(task: Task, over: str = "all", probes: int = 1, curvature: str = "auto", seed: int = 0) -> Scores:
    """``½ Σ_m H_mm w_m²``, the diagonal estimated without bias from ``probes`` random numbers a batch.

    ``curvature="labels"`` (taken for batches ``(inputs, labels)`` with one class index a sample): ``H_mm = N E[ĝ_m²]``, ĝ the gradient of the mean
    loss at N labels drawn from the model's own softmax. For a cross-entropy this is the diagonal of the Gauss-Newton matrix (Martens 2020;
    Liu et al. 2024), and that of the Hessian where the network is piecewise linear in each weight, as LeCun et al. take it; it is never negative.
    ``curvature="signs"`` (taken otherwise): ``H_mm = E[v_m (H v)_m]`` with random signs v (Bekas et al. 2007), for any loss, by Hessian
    products; its noise comes from all entries of H, so it takes hundreds of probes.
    """
    if curvature not in ("auto", "labels", "signs"):
        raise UnknownName(f"curvature is {curvature!r}; it is 'auto', 'labels' or 'signs'")
    weights, draws = task.parameters, torch.Generator().manual_seed(seed)
    diagonal = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    for batch in task.data:
        labels = curvature == "labels" or (curvature == "auto" and _classes(task.data, batch))
        for _ in range(probes):
            count += 1
            if labels:
                for name, grad in gradient(_with_drawn_labels(task.data, draws), weights, batch).items():
                    diagonal[name].addcmul_(grad, grad, value=samples(batch))
                continue
            vector = {n: (torch.randint(0, 2, w.shape, generator=draws) * 2 - 1).to(w) for n, w in weights.items()}
            for name, product in hessian_times(task, batch, vector).items():
                diagonal[name].add_(product * vector[name])
    return task.total({name: diagonal[name] / (2 * count) * weights[name].detach().square() for name in weights}, over)


def _classes(data: Data, batch: Any) -> bool:
    """Whether a batch is (inputs, labels) with one class index for each sample, and the loss a function of output and labels."""
    labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    whole = data.loss is None or data.whole
    return not whole and isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.is_floating_point() and len(labels) == samples(batch)


def _with_drawn_labels(data: Data, draws: torch.Generator) -> Data:
    """The same data, the loss taken at labels drawn from the softmax of the output."""
    assert data.loss is not None
    wanted = data.loss

    def loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            raise BadLoss("labels can be drawn where the output is a tensor of (samples, classes) only; give curvature='signs'")
        if not bool(torch.isfinite(output).all()):
            return wanted(output, labels)  # the check of the loss says what is wrong
        shares = output.detach().double().softmax(1).cpu()
        return wanted(output, torch.multinomial(shares, 1, generator=draws).ravel().to(labels))

    return replace(data, loss=loss)
