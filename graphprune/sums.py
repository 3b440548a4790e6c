"""Sums over all entries of every unit, read once: :func:`unit_sums`.

One pass over each weight yields its sums along both leading axes, in pieces that stay in the cache; what belongs to all
units of all groups is then added up in one call.

>>> [float(v) for v in axis_sums(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 2)[1]]
[10.0, 4.0]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from .groups import Groups

PIECE = 2**16


def unit_sums(groups: Groups, tensors: Mapping[str, torch.Tensor], power: int) -> list[torch.Tensor]:
    """Sum of ``|w| ** power`` (1 or 2) over the parameter entries that each unit takes along: float64, shape (units,) per group."""
    starts = np.cumsum([0, *(group.size for group in groups)])
    vectors: list[torch.Tensor] = []
    matrices: list[torch.Tensor] = []
    known: dict[tuple[str, int], torch.Tensor] = {}
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
            if (name, axis) not in known:
                known |= {(name, a): s for a, s in axis_sums(weight.detach().float(), power, axis).items()}
            matrices.append(known[name, axis])
            places[1].append((units, start))
    if vectors:
        vectors = [_powers(torch.cat(vectors), power)]
    if not vectors and not matrices:
        return [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    values = torch.cat([*vectors, *matrices]).double().cpu().numpy()
    units, offsets = zip(*places[0], *places[1], strict=True)
    index = np.concatenate(units)
    index = np.where(index < 0, starts[-1], index + np.repeat(offsets, [len(u) for u in units]))
    total = torch.from_numpy(np.bincount(index, values, minlength=starts[-1] + 1))
    return [total[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]


def axis_sums(weight: torch.Tensor, power: int, axis: int = 0) -> dict[int, torch.Tensor]:
    """The sums of ``|w| ** power`` along an axis; the two leading axes come together, from one pass over the weight."""
    if axis > 1:
        return {axis: _powers(weight, power).sum([a for a in range(weight.ndim) if a != axis])}
    flat = weight.flatten(1)
    if weight.numel() <= PIECE:
        sizes = _powers(flat, power)
        rows, columns = sizes.sum(1), sizes.sum(0)
    else:
        parts, columns = [], flat.new_zeros(flat.shape[1])
        for piece in flat.split(max(1, PIECE // flat.shape[1])):
            sizes = _powers(piece, power)
            parts.append(sizes.sum(1))
            columns += sizes.sum(0)
        rows = torch.cat(parts)
    return {0: rows, 1: columns.view(weight.shape[1], -1).sum(1) if weight.ndim > 2 else columns}


_SIZES: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {1: torch.abs, 2: torch.square}


def _powers(weight: torch.Tensor, power: int) -> torch.Tensor:
    return _SIZES[power](weight)
