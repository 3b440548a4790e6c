"""Scores from the linear algebra of feature maps: the rank of a map, and how much of the others a map cannot express."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .activations import _filled
from .registry import scorer
from .seen import Place, observe_samples, places
from .task import Scores, Task

Tensor = torch.Tensor


@scorer("activation", "mean rank of the feature map", "Lin et al. 2020 (HRank)", needs="inputs", cost="a forward pass and one SVD for each map")
def hrank(task: Task, work: float = 2**23, otherwise: str | None = None) -> Scores:
    """``E_n[rank(A_{n,c})]`` of the h x w map of each unit, at the first activation of the group (before it is flattened).

    A unit of several positions (a head) has the matrix of its positions over space; without either, the rank is 0 or 1.
    Ranks hardly differ between images (section 3.3 of the paper), so of every batch evenly spaced samples are decomposed, as many
    (at least one) as keep ``Σ h · w · min(h, w)`` of a group within ``work``; ``math.inf`` takes all.
    """
    every = [[unflattened(task, place) for place in group_places[:1]] for group_places in places(task)]
    sums = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups]
    counts = [0] * len(sums)

    def maps(place: Place, parts: Tensor) -> Tensor:
        """(samples, units, rows, columns)"""
        units = units_first(place, parts, len(sums[place.group]))
        if units.shape[2] > 1 or place.dim != 1 or len(place.value.shape) != 4:
            return units
        high, wide = place.value.shape[2:]
        high = round(math.sqrt(units.shape[3] * high / wide))  # the batch may have another resolution than the example
        return units.squeeze(2).unflatten(2, (high, -1)) if units.shape[3] % high == 0 else units

    def see(place: Place, parts: Tensor) -> None:
        one = maps(place, parts[:1])
        taken = maps(place, spaced(parts, one.numel() * min(one.shape[2:]), work))
        # Decompositions know no half precision.
        taken = taken if taken.dtype == torch.float64 else taken.float()
        sums[place.group] += torch.linalg.matrix_rank(taken).double().sum(0).cpu()
        counts[place.group] += len(taken)

    observe_samples(task, every, see)
    return _filled(task, every, [total / max(count, 1) for total, count in zip(sums, counts, strict=True)], otherwise, "hrank")


def spaced(parts: Tensor, each: int, work: float) -> Tensor:
    """Evenly spaced samples, as many as cost at most ``work`` together when one costs ``each``; at least one.

    >>> spaced(torch.arange(6), 10, 35).tolist()
    [0, 2, 4]
    """
    most = max(1, int(min(len(parts), work / max(each, 1))))
    return parts[:: math.ceil(len(parts) / most)]


@scorer("activation", "nuclear norm lost without the channel", "Sui et al. 2021 (CHIP)", needs="inputs", cost="a forward pass and an SVD for each sample")
def chip(task: Task, work: float = 2**26, otherwise: str | None = None) -> Scores:
    """``E_n[‖A_n‖_* − ‖A_n with row c zero‖_*]`` of the units x (positions, space) matrix, at the first activation of the group.

    Of every batch evenly spaced samples are decomposed, as many (at least one) as keep ``rows · columns · min(rows, columns)``
    of a group within ``work`` (the paper averages over a few batches); ``math.inf`` takes all.
    """
    every = [group_places[:1] for group_places in places(task)]
    sums = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups]
    counts = [0] * len(sums)

    def see(place: Place, parts: Tensor) -> None:
        each = parts[0].numel() * min(len(sums[place.group]), parts[0].numel() // len(sums[place.group]))
        taken = units_first(place, spaced(parts, each, work), len(sums[place.group])).flatten(2)
        for rows in taken:
            sums[place.group] += without_each_row(rows).cpu()
        counts[place.group] += len(taken)

    observe_samples(task, every, see)
    return _filled(task, every, [total / max(count, 1) for total, count in zip(sums, counts, strict=True)], otherwise, "chip")


def units_first(place: Place, parts: Tensor, size: int) -> Tensor:
    """(samples, positions, space) as (samples, units, positions of each, space)."""
    order = torch.argsort(place.along, stable=True)
    return parts[:, order[place.along[order] >= 0]].unflatten(1, (size, -1))


def unflattened(task: Task, place: Place) -> Place:
    """The same place before a flattening, where the map still has two axes of space."""
    graph, owner, value = task.groups.graph, task.groups, place.value
    shown = {id(v) for step in graph.steps for v in (*step.args, *step.results) if v is not None}
    local = torch.full((len(owner.root),), -1)
    local[torch.from_numpy(owner.groups[place.group].units)] = torch.arange(owner.groups[place.group].size)
    while len(value.shape) < 4 and value.node >= 0 and graph.nodes[value.node].op.regroups:
        value = graph.nodes[value.node].args[0]
        field = next((f for f in value.fields if f.shape[1:2] == value.shape[1:2] and f.size == value.shape[1]), None)
        if len(value.shape) == 4 and id(value) in shown and field is not None:
            return replace(place, value=value, dim=1, along=local[torch.from_numpy(owner.root[field.ravel()]).long()])
    return place


def without_each_row(rows: Tensor, step: float = 0.3) -> Tensor:
    """The nuclear norm that is lost when each row of a matrix is set to zero, all rows from one eigendecomposition.

    With ``M = A Aᵀ``, ``tr √M = 1/2π ∫ t^{-1/2} log det(1 + M/t) dt``; leaving out row c divides the determinant of
    ``M + t`` by ``1 / [(M + t)⁻¹]_cc`` and so the loss is ``−1/2π ∫ t^{-1/2} log(t [(M + t)⁻¹]_cc) dt``. With
    ``t = e^{2s}`` the trapezoid rule converges like ``exp(−π²/step)``.
    """
    values, weights, rest = strengths(rows)
    scale = values.max()
    if scale == 0:
        return values.new_zeros(len(rows))
    nodes = torch.arange(-34.0, 34.0, step, dtype=values.dtype, device=values.device).exp() * scale
    whole = values.square()[:, None] + nodes.square()
    # t [(M + t)⁻¹]_cc and one minus it, each from positive terms: neither may cancel where it is small.
    lost = weights @ (values.square()[:, None] / whole)
    left_over = (weights @ (nodes.square() / whole) + rest[:, None]).clamp(min=torch.finfo(values.dtype).tiny)
    logs = torch.where(lost < 0.5, torch.log1p(-lost), left_over.log())
    return -(logs @ nodes) * step / math.pi


def strengths(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: singular values of a matrix, the squared entries of its left singular vectors, and what these leave of each row's 1.

    Values in float32 are exact to 24 bits, so the eigenvalues of a float64 Gram matrix hold all that is known of them; float64 values are decomposed
    as they are.
    """
    if rows.dtype == torch.float64:
        left, values, _ = torch.linalg.svd(rows, full_matrices=len(rows) > rows.shape[1])
        return values, left[:, : len(values)].square(), left[:, len(values) :].square().sum(1)
    rows = rows.double()
    if len(rows) <= rows.shape[1]:
        squares, left = torch.linalg.eigh(rows @ rows.T)
        return squares.clamp(min=0).sqrt(), left.square(), rows.new_zeros(len(rows))
    squares, right = torch.linalg.eigh(rows.T @ rows)
    spanned = squares > 1e-13 * squares.max().clamp(min=torch.finfo(rows.dtype).tiny)
    squares, weights = squares[spanned], (rows @ right[:, spanned]).square() / squares[spanned]
    if not len(squares):
        return rows.new_zeros(1), rows.new_zeros(len(rows), 1), rows.new_ones(len(rows))
    return squares.sqrt(), weights, (1 - weights.sum(1)).clamp(min=0)
