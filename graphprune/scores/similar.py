"""Scores of units that resemble other units of their group: distance to the median, and the greedy removal of twins."""

from __future__ import annotations

import numpy as np
import torch

from ..coupling.groups import Group
from .fold import folded
from .order import in_order
from .registry import scorer
from .task import Scores, Task

Tensor = torch.Tensor


def rows(task: Task, group: Group, fold: bool = False) -> list[Tensor]:
    """The producers' weights as float64 matrices (units, entries); a unit's positions stand one after the other.

    Groups that no weight of two axes or more produces are described by whatever they hold.
    """
    weights = folded(task) if fold else task.parameters
    made = [place for place in task.places(group, "produces") if place[0] in weights and weights[place[0]].ndim > 1]
    return [by_unit(weights[n], axis, units, group.size) for n, axis, units in made or task.places(group) if n in weights]


def by_unit(weight: Tensor, axis: int, units: np.ndarray, size: int) -> Tensor:
    index = torch.from_numpy(units)
    order = torch.argsort(index, stable=True)
    order = order[index[order] >= 0]
    flat = weight.detach().movedim(axis, 0).flatten(1) if weight.ndim > 1 else weight.detach()[:, None]
    counts = torch.bincount(index[order], minlength=size)
    if bool((counts == counts[0]).all()):
        return flat[order].double().reshape(size, -1).cpu()
    within = torch.arange(len(order)) - (counts.cumsum(0) - counts)[index[order]]
    padded = torch.zeros(size, int(counts.max()), flat.shape[1], dtype=torch.float64)
    padded[index[order], within] = flat[order].double().cpu()
    return padded.flatten(1)


def distances(parts: list[Tensor]) -> Tensor:
    """Euclidean distances (units, units) between rows that consist of several parts.

    From inner products; where those cancel (nearly equal rows) the difference itself is taken.
    """
    size = len(parts[0])
    inner = sum((part @ part.T for part in parts), torch.zeros(size, size, dtype=torch.float64))
    norms = inner.diagonal()
    scale = norms[:, None] + norms[None]
    squares = scale - 2 * inner
    near = torch.triu((squares < 1e-4 * scale) & (scale > 0), diagonal=1).nonzero()
    for left, right in (chunk.T for chunk in near.split(max(1, 2**24 // max(part.shape[1] for part in parts)))):
        exact = sum((part[left] - part[right]).square().sum(1) for part in parts)
        squares[left, right] = squares[right, left] = exact
    return squares.fill_diagonal_(0).clamp(min=0).sqrt()


@scorer("norm", "distance to all other filters of the layer (geometric median)", "He et al. 2019 (FPGM)", cost="one product of filters per group")
def fpgm(task: Task, fold: bool = False) -> Scores:
    """``Σ_j ‖P_c − P_j‖₂`` over the producers' rows of a group: the filter closest to the geometric median goes first."""
    values = []
    for group in task.groups:
        parts = rows(task, group, fold)
        values.append(distances(parts).sum(1) if parts else torch.zeros(group.size, dtype=torch.float64))
    return values


@scorer("others", "greedy removal of the smaller of the two most similar filters", "Ayinde et al. 2019", cost="one product of filters per group")
def redundancy(task: Task, fold: bool = False) -> Scores:
    """``1 − |cos(P_c, P_j)|`` when c is removed: again and again the most similar pair loses its smaller filter.

    Of a cluster of twins one stays to the end, because each removal is judged among the filters that are left.
    """
    values = []
    for group in task.groups:
        parts = rows(task, group, fold)
        if not parts:
            values.append(torch.zeros(group.size, dtype=torch.float64))
            continue
        inner = torch.stack([part @ part.T for part in parts]).sum(0)
        values.append(greedy_twins(inner.numpy()))
    return values


def greedy_twins(inner: np.ndarray) -> Tensor:
    """The removal scores of units with these inner products (see :func:`redundancy`)."""
    norms = np.sqrt(np.diagonal(inner))
    likeness = np.abs(inner) / np.maximum(np.outer(norms, norms), np.finfo(float).tiny)
    likeness[norms == 0] = likeness[:, norms == 0] = 1.0  # nothing is lost with an empty filter
    np.fill_diagonal(likeness, -1.0)
    nearest = likeness.argmax(1)
    best = likeness[np.arange(len(inner)), nearest]
    order, values = [], []
    for _ in range(len(inner) - 1):
        first = int(best.argmax())
        right = int(nearest[first])
        gone = first if norms[first] < norms[right] or (norms[first] == norms[right] and first > right) else right
        order.append(gone)
        values.append(1.0 - best[first])
        likeness[gone] = likeness[:, gone] = -1.0
        best[gone] = -2.0
        lost = np.flatnonzero((nearest == gone) & (best > -2.0))
        nearest[lost] = likeness[lost].argmax(1)
        best[lost] = likeness[lost, nearest[lost]]
    last = int(np.setdiff1d(np.arange(len(inner)), order)[0])
    return in_order([*order, last], [*values, 1.0])
