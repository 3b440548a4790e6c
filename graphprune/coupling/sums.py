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

from ..operations.labels import Array
from ..tracing.trees import is_parameter
from .groups import Groups

PIECE = 2**17  # entries: a piece and its squares stay in the cache, and the calls are few


def unit_sums(groups: Groups, tensors: Mapping[str, torch.Tensor], power: int) -> list[torch.Tensor]:
    """Sum of ``|w| ** power`` (1 or 2) over the parameter entries that each unit takes along: float64, shape (units,) per group."""
    starts = np.cumsum([0, *(group.size for group in groups)])
    named = dict.fromkeys(name for group in groups for name, _ in group.places)
    weights = {name: tensors[name].detach() for name in named if is_parameter(tensors[name]) and not tensors[name].is_meta}
    sums = _vector_sums({name: weight.float() for name, weight in weights.items() if weight.ndim == 1}, power)
    axes: dict[str, set[int]] = defaultdict(set)
    for group in groups:
        for name, axis in group.places:
            if name in weights and name not in sums:
                axes[name].add(axis)
    sums |= {name: axis_sums(weights[name].float(), power, mine) for name, mine in axes.items()}
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


def _vector_sums(vectors: Mapping[str, torch.Tensor], power: int) -> dict[str, dict[int, Array]]:
    """Those of tensors with one axis, all in one call."""
    if not vectors:
        return {}
    every = _powers(torch.cat(list(vectors.values())), power).cpu().numpy()
    ends = np.cumsum([len(vector) for vector in vectors.values()]).tolist()
    return {name: {0: every[a:b]} for name, a, b in zip(vectors, [0, *ends], ends, strict=False)}


def axis_sums(weight: torch.Tensor, power: int, axes: Collection[int] = (0, 1)) -> dict[int, Array]:
    """The sums of ``|w| ** power`` along each of the axes; the two leading ones come from one pass over the weight."""
    if max(axes) > 1:
        sizes = _powers(weight, power)
        return {axis: sizes.sum([a for a in range(weight.ndim) if a != axis]).cpu().numpy() for axis in axes}
    flat = weight.flatten(1)
    step = max(1, PIECE // max(1, flat.shape[1]))
    if len(flat) <= step:
        sizes = _powers(flat, power)
        rows, columns = sizes.sum(1), sizes.sum(0)
    else:
        held = torch.empty_like(flat[:step])  # written again and again: fresh memory costs more than the sums
        every = [(sizes.sum(1), sizes.sum(0)) for piece in flat.split(step) for sizes in [_powers(piece, power, held[: len(piece)])]]
        rows, columns = torch.cat([along for along, _ in every]), torch.stack([across for _, across in every]).sum(0)
    if weight.ndim > 2:
        columns = columns.view(weight.shape[1], -1).sum(1)
    return {0: rows.cpu().numpy(), 1: columns.cpu().numpy()}


def _powers(weight: torch.Tensor, power: int, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.mul(weight, weight, out=out) if power == 2 else torch.abs(weight, out=out)
