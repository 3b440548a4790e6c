"""Sums over all entries of every unit, read once: :func:`unit_sums`.

One pass over each weight yields its sums along both leading axes, in pieces that stay in the cache; what belongs to all
units of all groups is then added up in one call.

>>> [float(v) for v in axis_sums(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 2)[1]]
[10.0, 4.0]
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from ..operations.labels import Array
from .groups import Groups

PIECE = 2**17  # entries: a piece and its squares stay in the cache, and the calls are few


class Rows(Protocol):
    """What positions of the first axis are read from as they are sliced: a tensor, or one that is in a file."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


def unit_sums(groups: Groups, tensors: Mapping[str, Rows], power: int) -> list[torch.Tensor]:
    """Sum of ``|w| ** power`` (1 or 2) over the parameter entries that each unit takes along: float64, shape (units,) per group.

    ``tensors`` holds the parameters that count, by name; each is asked for once, and not all at a time.
    """
    starts = np.cumsum([0, *(group.size for group in groups)])
    sums = _sums(groups, tensors, power)
    # Many axes of a group hold its units in the same order: these are added up before the units are looked for.
    along: dict[tuple[int, int], tuple[Array, Array]] = {}
    for group, start in zip(groups, starts.tolist(), strict=False):
        for (name, axis), stand in group.places.stands.items():
            if name in sums:
                key = start, id(stand)
                values = sums[name][axis] if stand.positions is None else sums[name][axis][stand.positions]
                along[key] = stand.units, along[key][1] + values if key in along else values.astype(np.float64)
    if not along:
        return [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    units, values = (np.concatenate(column) for column in zip(*along.values(), strict=True))
    offsets = np.repeat([start for start, _ in along], [len(mine) for mine, _ in along.values()])
    index = np.where(units < 0, starts[-1], units + offsets)
    total = torch.from_numpy(np.bincount(index, values, minlength=starts[-1] + 1))
    return [total[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]


def _sums(groups: Groups, tensors: Mapping[str, Rows], power: int) -> dict[str, dict[int, Array]]:
    """The sums of every tensor along its axes on which units of a group stand."""
    axes: dict[str, set[int]] = defaultdict(set)
    for group in groups:
        for name, axis in group.places:
            if name in tensors:
                axes[name].add(axis)
    deep = {name for name in axes if len(groups.graph.leaves[name].shape) > 1}
    sums = _vector_sums({name: _float(tensors[name]) for name in axes if name not in deep}, power)
    return sums | {name: axis_sums(tensors[name], power, numbers) for name, numbers in axes.items() if name in deep}


def _vector_sums(vectors: Mapping[str, torch.Tensor], power: int) -> dict[str, dict[int, Array]]:
    """Those of tensors with one axis, all in one call."""
    if not vectors:
        return {}
    every = _powers(torch.cat(list(vectors.values())), power).cpu().numpy()
    ends = np.cumsum([len(vector) for vector in vectors.values()]).tolist()
    return {name: {0: every[a:b]} for name, a, b in zip(vectors, [0, *ends], ends, strict=False)}


def axis_sums(weight: Rows, power: int, axes: Collection[int] = (0, 1)) -> dict[int, Array]:
    """The sums of ``|w| ** power`` along each of the axes; all come from one pass over the weight."""
    shape = tuple(weight.shape)
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    if max(axes) > 1:
        return _deep_sums(weight, power, axes, step)
    if shape[0] <= step:
        sizes = _powers(_float(weight).flatten(1), power)
        rows, columns = sizes.sum(1), sizes.sum(0)
    else:
        every, scratch = [], None  # written again and again: fresh memory costs more than the sums
        for start in range(0, shape[0], step):
            piece = _float(weight, start, start + step).flatten(1)
            scratch = torch.empty_like(piece) if scratch is None else scratch
            sizes = _powers(piece, power, scratch[: len(piece)])
            every.append((sizes.sum(1), sizes.sum(0)))
        rows, columns = torch.cat([along for along, _ in every]), torch.stack([across for _, across in every]).sum(0)
    if len(shape) > 2:
        columns = columns.view(shape[1], -1).sum(1)
    return {0: rows.cpu().numpy(), 1: columns.cpu().numpy()}


def _deep_sums(weight: Rows, power: int, axes: Collection[int], step: int) -> dict[int, Array]:
    """The same along axes beyond the second: pieces are added up in float64."""
    first: list[Array] = []
    others: dict[int, Array] = {}
    for start in range(0, weight.shape[0], step):
        sizes = _powers(_float(weight, start, start + step), power)
        for axis in axes:
            along = sizes.sum([a for a in range(sizes.ndim) if a != axis]).cpu().numpy()
            if axis == 0:
                first.append(along)
            else:
                others[axis] = others[axis] + along if axis in others else along.astype(np.float64)
    return others | ({0: np.concatenate(first)} if first else {})


def _float(weight: Rows, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Some rows in float32; of a tensor no copy is made where it is not needed."""
    if isinstance(weight, torch.Tensor):
        whole = weight.detach()
        return (whole if stop is None else whole[start:stop]).float()
    return weight[slice(start, stop)].float()


def _powers(weight: torch.Tensor, power: int, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.mul(weight, weight, out=out) if power == 2 else torch.abs(weight, out=out)
