"""Norms: a statistic over some axes (marked ``[c]``), and a scale and shift along others."""

from __future__ import annotations

from functools import cache
from typing import Any

from .notation import Expr, Value, expr
from .record import LETTERS, computes, describe


@computes("native_batch_norm", fused=True, norm="batch")
@computes("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", norm="batch")
def batch_norm(x, weight, bias, *rest):
    stats = [v for v in rest if isinstance(v, Value)]
    training = any([v is True for v in rest]) or len(stats) < 2
    mean, var = stats if len(stats) == 2 else (None, None)
    return Expr(_batch_norm(len(x.shape), training), (x, weight, bias, mean, var))


@cache
def _batch_norm(rank: int, training: bool) -> str:
    wrap = "[%s]" if training else "%s"
    axes = " ".join([wrap % LETTERS[i] if i != 1 else "b" for i in range(rank)])
    return f"{axes}, b, b, b, b -> {axes}"


def _shape_of(x, shape, *rest) -> dict[Any, Any]:
    return {1: list(x.shape[len(x.shape) - len(shape) :])}


@computes("native_layer_norm", norm="layer", follows=_shape_of)
def layer_norm(x, shape, weight, bias, eps):
    lead, last = LETTERS[: len(x.shape) - len(shape)], LETTERS[len(x.shape) - len(shape) : len(x.shape)]
    mixed = [f"[{axis}]" for axis in last]
    normalised = " ".join(last)
    return expr(f"{' '.join([*lead, *mixed])}, {normalised}, {normalised} -> {' '.join([*lead, *mixed])}", x, weight, bias)


@computes("_fused_rms_norm", norm="rms", follows=_shape_of)
def rms_norm(x, shape, weight, eps):
    return layer_norm(x, shape, weight, None, eps)


def _sizes_of(x, *rest) -> dict[Any, Any]:
    return {3: x.shape[0], 4: x.shape[1], 5: x.shape[2:].numel()}


@computes("native_group_norm", norm="group", follows=_sizes_of)
def group_norm(x, weight, bias, n, c, hxw, groups, eps):
    space = "".join(f" [{LETTERS[i + 10]}]" for i in range(len(x.shape) - 2))
    return expr(f"b (g [c]){space}, (g c), (g c) -> b (g [c]){space}", x, weight, bias, g=groups)


@computes("_weight_norm_interface")
def weight_norm(v, g, dim=0):
    # dim == -1 is torch's word for one norm over everything.
    axes = [LETTERS[i] if i == dim else f"[{LETTERS[i]}]" for i in range(len(v.shape))]
    scale = " ".join(LETTERS[i] if i == dim else "1" for i in range(len(g.shape)))
    return expr(f"{' '.join(axes)}, {scale} -> {' '.join(axes)}, {scale}", v, g)


describe("_weight_norm_interface", planned=True, statistic="norm")
