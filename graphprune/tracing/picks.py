"""Entries picked by an integer buffer: the labels are picked with them, and the buffer is renumbered when they are cut.

``x.index_select(1, self.order)`` and ``x[:, self.order]`` read position ``order[p]`` for each ``p``. The picked label and the buffer's own at
``p`` are joined, so the buffer loses the entries that are not wanted any more; those that stay count the survivors. Positions that are written in the
code (``x[:, [-2]]``) cannot follow: what they are counted over stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..operations.labels import Fields, Labels, Reason, compact, varying
from ..operations.notation import Value

INTEGERS = frozenset((torch.int64, torch.int32))


def picked(args: tuple[Any, ...], numbers: dict[str, torch.Tensor]) -> tuple[Value, int, Value] | None:
    """The tensor, the axis and the buffer of a call that picks by a whole buffer, or None."""
    if len(args) == 3:  # an axis and one tensor
        x, dim, index = args
    else:
        x, indices = args
        indexed = [i for i, item in enumerate(indices) if isinstance(item, Value)]
        if len(indexed) != 1:
            return None
        dim, index = indexed[0], indices[indexed[0]]
    dim %= max(len(x.shape), 1)
    if index.leaf not in numbers or len(index.shape) != 1 or index.shape[0] < 2 or not any(field.shape[dim] > 1 for field in x.fields):
        return None
    return x, dim, index


def pick(labels: Labels, x: Value, dim: int, index: Value, numbers: torch.Tensor, reason: int) -> list[Fields]:
    """The fields of the result; ``numbers`` are the buffer's values, shape (picked,)."""
    order = numbers.detach().cpu().numpy()
    flat, fields = index.fields[0].ravel(), []
    for field in x.fields:
        if field.shape[dim] > 1:
            field = field.take(order, axis=dim, mode="wrap")
            over = varying(field)
            if dim not in over:  # the same entry again and again
                field = compact(field)
                labels.lock(flat, reason)
            elif len(over) == 1:
                labels.join(flat, field.ravel())
            else:
                dense = field.reshape([field.shape[axis] for axis in over])
                labels.joint(dense)
                labels.join(flat, labels.marginal(dense, (over.index(dim),)))
        fields.append(field)
    return [tuple(fields)]


def written(args: tuple[Any, ...], nodes: Sequence[Any], constants: Mapping[str, torch.Tensor]) -> tuple[Value, int, list[int]] | None:
    """The tensor, the axis and the positions of a call whose positions are written in the code (``x[:, [-2, -1]]``), or None."""
    indexed = [(dim, item) for dim, item in enumerate(args[1]) if isinstance(item, Value)] if len(args) == 2 else [args[1:]]
    if len(indexed) != 1 or not isinstance(indexed[0][1], Value):
        return None
    dim, index = indexed[0]
    while not index.leaf and 0 <= index.node < len(nodes) and nodes[index.node].op.stays and len(nodes[index.node].held) == 1:
        index = nodes[index.node].held[0]
    tensor, x = constants.get(index.leaf), args[0]
    if tensor is None or tensor.is_meta or tensor.ndim != 1 or tensor.dtype not in INTEGERS or not tensor.numel():
        return None
    dim %= max(len(x.shape), 1)
    return (x, dim, tensor.tolist()) if any(field.shape[dim] > 1 for field in x.fields) else None


def take(labels: Labels, x: Value, dim: int, positions: list[int], reason: int) -> list[Fields]:
    """The fields of the result; what positions are counted over, from the first or from the last on, stays whole, and the rest of the axis may go."""
    first, last = max((at for at in positions if at >= 0), default=-1), min((at for at in positions if at < 0), default=0)
    counted = np.r_[: first + 1, x.shape[dim] + last : x.shape[dim]]
    fields = []
    for field in x.fields:
        over = varying(field)
        if dim in over:
            names = field.ravel() if len(over) == 1 else labels.marginal(field.reshape([field.shape[axis] for axis in over]), (over.index(dim),)).ravel()
            labels.lock(names[counted], reason)
            field = compact(field.take(positions, axis=dim))
        fields.append(field)
    return [tuple(fields)]


def settle(labels: Labels, picks: dict[str, list[tuple[Value, int]]], nodes: list[Any], leaves: dict[str, Value]) -> dict[str, tuple[Value, int]]:
    """What each buffer counts, (tensor, axis). Where it is used otherwise, or counts axes of several lengths, these axes stay whole."""
    if not picks:
        return {}
    other = {v.leaf for node in nodes if not node.op.picks for v in node.held}
    numbered = {}
    for name, places in picks.items():
        (value, dim), *rest = places
        counted = [[field for field in v.fields if field.shape[d] > 1] for v, d in places]
        single = all(len(fields) == 1 and fields[0].size == v.shape[d] for fields, (v, d) in zip(counted, places, strict=True))
        if name in other or (rest and not single) or len({v.shape[d] for v, d in places}) > 1:
            reason = labels.reason(Reason(f"{name} numbers positions of this axis, and is used in other ways"))
            for field in (*leaves[name].fields, *(field for fields in counted for field in fields)):
                labels.lock(field.ravel(), reason)
            continue
        for fields in counted[1:]:
            labels.join(counted[0][0].ravel(), fields[0].ravel())
        numbered[name] = (value, dim)
    return numbered


def renumber(mask: np.ndarray) -> list[int]:
    """The new number of every position, -1 for those that go.

    >>> renumber(np.array([True, False, True]))
    [0, -1, 1]
    """
    return np.where(mask, np.cumsum(mask) - 1, -1).tolist()
