"""Entries picked by an integer buffer: the labels are picked with them, and the buffer is renumbered when they are cut.

``x.index_select(1, self.order)`` and ``x[:, self.order]`` read position ``order[p]`` for each ``p``. The picked label and the buffer's own at
``p`` are joined, so the buffer loses the entries that are not wanted any more; those that stay count the survivors.
"""

from __future__ import annotations

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
