"""Sums over all entries of every unit, read once: :func:`unit_sums`.

One pass over each weight yields its sums along both leading axes, in pieces that stay in the cache; what belongs to all
units of all groups is then added up in one call.

>>> [float(v) for v in axis_sums(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 2)[1]]
[10.0, 4.0]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np
import torch

from ..tracing.labels import Array
from .groups import Groups

PIECE = 2**16


def unit_sums(groups: Groups, tensors: Mapping[str, torch.Tensor], power: int) -> list[torch.Tensor]:
    """Sum of ``|w| ** power`` (1 or 2) over the parameter entries that each unit takes along: float64, shape (units,) per group."""
    starts = np.cumsum([0, *(group.size for group in groups)])
    vectors: list[torch.Tensor] = []
    matrices: list[tuple[str, int]] = []
    axes: dict[str, set[int]] = defaultdict(set)
    places: tuple[list, list] = ([], [])
    for group, start in zip(groups, starts.tolist(), strict=False):
        for (name, axis), units in group.places.items():
            weight = tensors[name]
            if not isinstance(weight, torch.nn.Parameter) or weight.is_meta:
                continue
            if weight.ndim == 1:
                vectors.append(weight.detach().float())
                places[0].append((units, start))
                continue
            axes[name].add(axis)
            matrices.append((name, axis))
            places[1].append((units, start))
    if not vectors and not matrices:
        return [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    sums = {name: axis_sums(tensors[name].detach().float(), power, mine) for name, mine in axes.items()}
    values = [_powers(torch.cat(vectors), power).cpu().numpy()] if vectors else []
    values += [sums[name][axis] for name, axis in matrices]
    units, offsets = zip(*places[0], *places[1], strict=True)
    index = np.concatenate(units)
    index = np.where(index < 0, starts[-1], index + np.repeat(offsets, [len(u) for u in units]))
    total = torch.from_numpy(np.bincount(index, np.concatenate(values), minlength=starts[-1] + 1))
    return [total[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]


def axis_sums(weight: torch.Tensor, power: int, axes: Collection[int] = (0, 1)) -> dict[int, Array]:
    """The sums of ``|w| ** power`` along each of the axes; the two leading ones come from one pass over the weight."""
    if max(axes) > 1:
        sizes = _powers(weight, power)
        return {axis: sizes.sum([a for a in range(weight.ndim) if a != axis]).cpu().numpy() for axis in axes}
    flat = weight.flatten(1)
    rows, columns = [], np.zeros(flat.shape[1], dtype=np.float32)
    for piece in flat.split(max(1, PIECE // max(1, flat.shape[1]))):
        along, across = _both(piece, power)
        rows.append(along)
        columns += across
    return {0: np.concatenate(rows), 1: columns.reshape(weight.shape[1], -1).sum(1) if weight.ndim > 2 else columns}


def _both(piece: torch.Tensor, power: int) -> tuple[Array, Array]:
    if power == 2 and piece.device.type == "cpu":  # no array of squares
        values = piece.numpy()
        return torch.linalg.vector_norm(piece, dim=1).square_().numpy(), np.einsum("ij,ij->j", values, values)
    sizes = _powers(piece, power)
    return sizes.sum(1).cpu().numpy(), sizes.sum(0).cpu().numpy()


def _powers(weight: torch.Tensor, power: int) -> torch.Tensor:
    return weight.square() if power == 2 else weight.abs()
