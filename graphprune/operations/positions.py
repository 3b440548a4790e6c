"""Which entries of an axis a call takes, in order, where its numbers say it: a slice, one position, a roll, padding.

A function gets the positions along one axis of its operand (``axis`` of ``rank``) and the call's other arguments; -1 is an entry that is new.

>>> operation("aten::slice").entries(np.arange(5), 1, 2, 1, 1, 4).tolist()
[1, 2, 3]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .labels import Array
from .record import describe, operation

__all__ = ["operation"]


def _slice(at: Array, axis: int, rank: int, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    return at[start:end:step] if dim % rank == axis else at


def _select(at: Array, axis: int, rank: int, dim: int, index: int) -> Array:
    return at[index : index + 1 or None] if dim % rank == axis else at


def _roll(at: Array, axis: int, rank: int, shifts: Sequence[int], dims: Sequence[int] = ()) -> Array:
    for shift, dim in zip(shifts, dims, strict=False):
        at = np.roll(at, shift) if dim % rank == axis else at
    return at


def _pad(at: Array, axis: int, rank: int, amounts: Sequence[int], value: float = 0) -> Array:
    back = 2 * (rank - 1 - axis)
    low, high = amounts[back : back + 2] if back < len(amounts) else (0, 0)
    at = np.concatenate([np.full(max(low, 0), -1), at, np.full(max(high, 0), -1)])
    return at[max(-low, 0) : len(at) - max(-high, 0)]


describe("slice", entries=_slice)
describe("select", entries=_select)
describe("roll", entries=_roll)
describe("constant_pad_nd", entries=_pad)
