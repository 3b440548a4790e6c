"""Positions that a tensor names: the axis they are taken from stays, or goes with the buffer that holds them (``tracing/picks.py``)."""

from __future__ import annotations

from .notation import Value, expr
from .record import LETTERS, computes


@computes("embedding", table=True)
def embedding(weight, index, *args, **kwargs):
    lead = " _" * len(index.shape)
    return expr(f"_ e,{lead} -> {lead} e", weight, index)


@computes("gather")
def gather(x, dim, index, **kwargs):
    axes = ["_" if i == dim % len(x.shape) else LETTERS[i] for i in range(len(x.shape))]
    return expr(f"{' '.join(axes)}, {' '.join(axes)} -> {' '.join(axes)}", x, index)


@computes("index_select", picks=True)
def index_select(x, dim, index):
    axes = ["_" if i == dim % len(x.shape) else LETTERS[i] for i in range(len(x.shape))]
    return expr(f"{' '.join(axes)}, _ -> {' '.join(axes)}", x, index)


@computes("index", picks=True)
def index(x, indices):
    given = [i for i, v in enumerate(indices) if isinstance(v, Value)]
    axes = ["_" if i in given else LETTERS[i] for i in range(len(x.shape))]
    rank = max(len(indices[i].shape) for i in given)
    together = given == list(range(given[0], given[-1] + 1))
    rest = [a for i, a in enumerate(axes) if i not in given]
    at = given[0] if together else 0
    out = rest[:at] + ["_"] * rank + rest[at:]
    picked = [indices[i] for i in given]
    fixed = "".join("," + " _" * len(v.shape) for v in picked)
    return expr(f"{' '.join(axes)}{fixed} -> {' '.join(out)}", x, *picked)
