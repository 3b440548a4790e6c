"""One half of an axis gates the other: both halves keep the same positions."""

from __future__ import annotations

from .notation import expr
from .record import LETTERS, computes


@computes("glu")
def glu(x, dim=-1):
    axes = list(LETTERS[: len(x.shape)])
    dim %= len(axes)
    halves = [f"(_h {axis})" if i == dim else axis for i, axis in enumerate(axes)]
    return expr(f"{' '.join(halves)} -> {' '.join(axes)}", x, _h=2)
