"""Whole matrices at once (inverses, decompositions): their two axes stay, those before them do not matter."""

from __future__ import annotations

from .notation import Value, expr
from .record import LETTERS, computes


def _lead(x: Value, inner: int = 2) -> str:
    return " ".join(LETTERS[: len(x.shape) - inner])


@computes("linalg_inv_ex", "linalg_cholesky_ex", "cholesky_inverse", "linalg_matrix_exp")
def inverse(x, *args, **kwargs):
    lead = _lead(x)
    return expr(f"{lead} _ _ -> {lead} _ _, {lead}", x)


@computes("linalg_qr", "linalg_lu_factor_ex")
def factors_of(x, *args, **kwargs):
    lead = _lead(x)
    return expr(f"{lead} _ _ -> {lead} _ _, {lead} _ _", x)


@computes("_linalg_det", "_linalg_slogdet")
def determinant(x, *args):
    lead = _lead(x)
    return expr(f"{lead} _ _ -> {lead}", x)


@computes("linalg_cross")
def cross(x, y, *, dim=-1):
    axes = " ".join("_" if i == dim % len(x.shape) else LETTERS[i] for i in range(len(x.shape)))
    return expr(f"{axes}, {axes} -> {axes}", x, y)
