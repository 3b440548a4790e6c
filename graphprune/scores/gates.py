"""Scores from a gate on every unit: the gradient of each sample's loss with respect to one factor per unit.

``∂L_n/∂m_c = Σ_x Σ_space a^x_{n,c} ∂L_n/∂a^x_{n,c}`` over all activations x that share the unit. No sample needs a
backward pass of its own.
"""

from __future__ import annotations

import numpy as np
import torch

from ..cost import costs
from ..errors import BadScore, UnknownName
from .registry import scorer
from .seen import gate_gradients, places
from .task import Scores, Task

Tensor = torch.Tensor


def gated(task: Task, join: str) -> tuple[Scores, int]:
    """Sums over all samples of the squared (or absolute) gate gradients, and the number of samples."""
    every = places(task)
    blind = [group.name for group, group_places in zip(task.groups, every, strict=True) if not group_places]
    if blind:
        raise BadScore(f"no activation shows the units of {', '.join(blind[:3])}: score weights instead (taylor, fisher), or keep= them")
    total, count = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups], 0
    for grads in gate_gradients(task, every):
        count += len(grads[0])
        total = [before + (g.square() if join == "square" else g.abs()).sum(0) for before, g in zip(total, grads, strict=True)]
    return total, count


@scorer("first order", "squared first-order change of each sample's loss at a gate", "Molchanov et al. 2019", needs="loss", cost="one backward pass")
def taylor_gate(task: Task, form: str = "square") -> Scores:
    """``E_n[(Σ a ∂L_n/∂a)²]``; with ``form="abs"`` the absolute value instead (Molchanov et al. 2017, with ``normalise="l2"``)."""
    if form not in ("square", "abs"):
        raise UnknownName(f"form is {form!r}; it is 'square' or 'abs'")
    total, count = gated(task, form)
    return [sums / count for sums in total]


@scorer("second order", "diagonal Fisher information of a mask over the units", "Kwon et al. 2022", needs="loss", cost="one backward pass")
def mask_fisher(task: Task) -> Scores:
    """``½ Σ_n (∂L_n/∂m_c)²`` over all samples."""
    return [sums / 2 for sums in gated(task, "square")[0]]


@scorer("second order", "Fisher information of a shared gate by activation memory", "Liu et al. 2021 (Group Fisher)", needs="loss", cost="one backward pass")
def group_fisher(task: Task, per: str = "memory") -> Scores:
    """``Σ_n (Σ_{x ∈ 𝒳} Σ a^x ∂L_n/∂a^x)²``, summed over coupled tensors before and over samples after the square, divided by
    the activation entries that one unit frees (``per="memory"``), or by its multiply-accumulates (``"macs"``), or by nothing (``"none"``).
    """
    freed = {"memory": freed_entries, "macs": freed_macs, "none": lambda task: [1.0] * len(task.groups)}
    if per not in freed:
        raise UnknownName(f"per is {per!r}; it is 'memory', 'macs' or 'none'")
    total = gated(task, "square")[0]
    return [sums / size for sums, size in zip(total, freed[per](task), strict=True)]


def freed_macs(task: Task) -> list[float]:
    """Multiply-accumulates that one unit of each group takes along when it alone goes, for the recorded example."""
    known, sizes = costs(task.groups), np.array([float(group.size) for group in task.groups])
    macs = known.at(np.concatenate([sizes[None], sizes - np.eye(len(sizes))]), ["macs"])["macs"]
    return [max(float(macs[0] - less), 1.0) for less in macs[1:]]


def freed_entries(task: Task) -> list[Tensor]:
    """Activation entries that disappear with each unit of a group, for the recorded example."""
    groups = task.groups
    freed = torch.zeros(len(groups), dtype=torch.float64)
    for node in groups.graph.nodes:
        if node.op.move:
            continue  # a view holds nothing of its own
        for value in node.outs:
            share = torch.zeros(len(groups), dtype=torch.float64)
            for field in value.fields:
                owner, counts = np.unique(groups.owner[groups.root[field]], return_counts=True)
                for index, count in zip(owner[owner >= 0], counts[owner >= 0], strict=True):
                    share[index] = max(float(share[index]), count / field.size)
            freed += share * float(np.prod(value.shape))
    return [(entries / group.size).clamp(min=1) for group, entries in zip(groups, freed, strict=True)]
