"""Transforms along axes, which stay, and complex numbers as pairs of real ones."""

from __future__ import annotations

from .notation import expr
from .record import LETTERS, computes
from .reductions import dims


@computes("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fft(x, dim, *args):
    over = dims(dim, len(x.shape))
    axes = " ".join("_" if i in over else LETTERS[i] for i in range(len(x.shape)))
    return expr(f"{axes} -> {axes}", x)


@computes("view_as_complex")
def view_as_complex(x):
    axes = " ".join(LETTERS[: len(x.shape) - 1])
    return expr(f"{axes} _ -> {axes}", x)


@computes("view_as_real")
def view_as_real(x):
    axes = " ".join(LETTERS[: len(x.shape)])
    return expr(f"{axes} -> {axes} _", x)
