"""Parts of an axis that the code takes as a share of it (``x[:, : c // 8]``): :func:`shares` ties the entries so that the share stays exact.

As with ``chunk``: of an axis of 32, a part of ``c // 8`` or ``3 * c // 8`` is right after a cut if the eight equal parts keep the same entries. So is a
number of blocks that no attribute holds (``F.group_norm(x, 4)``): every block keeps the same ones.

>>> from ..operations.notation import Value
>>> from ..tracing.needs import Call, Need
>>> x = Value((4,), (np.arange(4, dtype=np.int32),))
>>> half = Call(("//", ("dim", x, 0), 2), Need("before", x, 0, 2), "__getitem__", "", "")
>>> [(left.tolist(), right.tolist()) for left, right in shares(half, {})]
[([[0], [1]], [[2], [3]])]
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..operations.labels import Array
from ..operations.notation import Value
from ..tracing.needs import Call
from ..tracing.sizes import Expr, evaluate, leaves


def shares(call: Call, symbols: Mapping[tuple, int]) -> list[tuple[Array, Array]]:
    """The labels to tie in pairs, so that the size given to a call stays the share of its axis that it is; none where it is no share."""
    if call.need.kind == "blocks" and isinstance(call.expr, int):
        return _equal_parts(call.need.value, call.need.dim, call.need.at)
    axes = [(leaf[1], leaf[2]) for leaf in leaves(call.expr) if leaf[0] == "dim"] or [(call.need.value, call.need.dim)]
    value, dim = axes[0]
    length = value.shape[dim]

    def whole(leaf: Expr) -> int:
        return leaf[1].shape[leaf[2]] if leaf[0] == "dim" else symbols.get(leaf[1], 0)

    part = evaluate(call.expr, whole)
    if isinstance(call.expr, int) or not 0 < part < length:
        return []
    count = length // math.gcd(part, length)
    for times in (1, 2, 3, 5):

        def scaled(leaf: Expr, times: int = times) -> int:
            return whole(leaf) * times * count // length

        if evaluate(call.expr, scaled) != part * times * count // length:
            return []
    return _equal_parts(value, dim, count)


def _equal_parts(value: Value, dim: int, count: int) -> list[tuple[Array, Array]]:
    """The labels of ``count`` equal parts of an axis in pairs of those that are to go together: the first part's with each other part's."""
    pairs = []
    for field in value.fields:
        if field.shape[dim] > 1:
            first, *others = np.moveaxis(field, dim, 0).reshape(count, value.shape[dim] // count, -1)
            pairs += [(first, other) for other in others]
    return pairs
