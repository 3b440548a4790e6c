"""First and second order in the weights: what the loss would change if all slices of a unit became zero."""

from __future__ import annotations

import torch

from .data import gradient, gradients, one_by_one
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


@scorer("second order", "diagonal of the Hessian times squared weights", "LeCun et al. 1990 (OBD)", needs="loss", cost="`probes` Hessian products a batch")
def obd(task: Task, over: str = "all", probes: int = 1, seed: int = 0) -> Scores:
    """``½ Σ_m H_mm w_m²`` with the Hessian's diagonal from random signs, ``H_mm = E[v_m (H v)_m]`` (Bekas et al. 2007)."""
    weights = task.parameters
    signs = torch.Generator().manual_seed(seed)
    diagonal = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    for batch in task.data:
        for _ in range(probes):
            count += 1
            vector = {n: (torch.randint(0, 2, w.shape, generator=signs) * 2 - 1).to(w) for n, w in weights.items()}
            for name, product in hessian_times(task, batch, vector).items():
                diagonal[name].add_(product * vector[name])
    return task.total({name: diagonal[name] / (2 * count) * weights[name].detach().square() for name in weights}, over)
