"""Scores from the linear algebra of feature maps: the rank of a map, and how much of the others a map cannot express."""

from __future__ import annotations

import math

import torch

from .activations import _filled
from .registry import scorer
from .seen import Place, observe_samples, places
from .task import Scores, Task

Tensor = torch.Tensor


def _first(every: list[list[Place]]) -> list[list[Place]]:
    return [mine[:1] for mine in every]


@scorer("activation", "mean rank of the feature map", "Lin et al. 2020 (HRank)", needs="inputs", cost="a forward pass and one SVD for each map")
def hrank(task: Task, otherwise: str | None = None) -> Scores:
    """``E_n[rank(A_{n,c})]`` of the h x w map of each unit, at the first activation of the group.

    A unit of several positions (a head) has the matrix of its positions over space; without space or positions a map's rank is 0 or 1.
    """
    every = _first(places(task))
    sums = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups]

    def see(place: Place, parts: Tensor) -> None:
        size = len(sums[place.group])
        order = torch.argsort(place.along, stable=True)
        order = order[place.along[order] >= 0]
        maps = parts[:, order].unflatten(1, (size, -1))  # (samples, units, positions, space)
        space = place.value.shape[2:] if place.dim == 1 and len(place.value.shape) == 4 else ()
        if maps.shape[2] == 1 and len(space) == 2:
            sides = (round(math.sqrt(maps.shape[3] * space[0] / space[1])), -1)  # the batch may have another resolution than the example
            maps = maps.squeeze(2).unflatten(2, sides if maps.shape[3] % sides[0] == 0 else (1, -1))
        sums[place.group] += torch.linalg.matrix_rank(maps).double().sum(0).cpu()

    count = observe_samples(task, every, see)
    return _filled(task, every, [total / count for total in sums], otherwise, "hrank")


@scorer("activation", "nuclear norm lost without the channel", "Sui et al. 2021 (CHIP)", needs="inputs", cost="a forward pass and an SVD for each sample")
def chip(task: Task, otherwise: str | None = None) -> Scores:
    """``E_n[‖A_n‖_* − ‖A_n with row c zero‖_*]`` of the channels x space matrix, at the first activation of the group."""
    every = _first(places(task))
    sums = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups]

    def see(place: Place, parts: Tensor) -> None:
        for rows in parts.double():
            sums[place.group] += place.by_unit(without_each_row(rows), len(sums[place.group]))

    count = observe_samples(task, every, see)
    return _filled(task, every, [total / count for total in sums], otherwise, "chip")


def without_each_row(rows: Tensor, step: float = 0.3) -> Tensor:
    """The nuclear norm that is lost when each row of a matrix is set to zero, all rows from one eigendecomposition.

    With ``M = A Aᵀ``, ``tr √M = 1/2π ∫ t^{-1/2} log det(1 + M/t) dt``; leaving out row c divides the determinant of
    ``M + t`` by ``1 / [(M + t)⁻¹]_cc`` and so the loss is ``−1/2π ∫ t^{-1/2} log(t [(M + t)⁻¹]_cc) dt``. With
    ``t = e^{2s}`` the trapezoid rule converges like ``exp(−π²/step)``.
    """
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    scale = values.max()
    if scale == 0:
        return torch.zeros(len(rows), dtype=rows.dtype)
    weights = left.square()
    rest = (1 - weights.sum(1)).clamp(min=0)
    rest = rest * (rest > 1e-12) if len(values) == len(rows) else rest
    nodes = torch.arange(-34.0, 34.0, step, dtype=rows.dtype).exp() * scale
    share = values.square()[:, None] / (values.square()[:, None] + nodes.square())
    lost = weights @ share  # 1 − t [(M + t)⁻¹]_cc: small for large t, where the logarithm must not cancel
    left_over = (weights @ (1 - share) + rest[:, None]).clamp(min=torch.finfo(rows.dtype).tiny)
    logs = torch.where(lost < 0.5, torch.log1p(-lost), left_over.log())
    return -(logs @ nodes) * step / math.pi
