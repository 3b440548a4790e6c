"""Losses: one number for each entry or row, or one for all of them."""

from __future__ import annotations

from .notation import Expr, Value, expr
from .record import computes, describe, pointwise


def _all(every: Expr) -> Expr:
    left = ", ".join(" ".join(f"[{axis}]" for axis in part.split()) for part in every.text.partition("->")[0].split(","))
    return Expr(f"{left} ->", every.operands, every.sizes)


@computes("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", statistic="mean")
def of_two(x, y, reduction=1, *args):
    every = pointwise([x, y], [max(len(x.shape), len(y.shape))])
    return _all(every) if reduction else every


@computes("binary_cross_entropy", "binary_cross_entropy_with_logits", statistic="mean")
def binary(x, y, weight=None, *rest):
    reduction = rest[-1] if rest else 1
    values = [v for v in (x, y, weight, *rest) if isinstance(v, Value)]
    every = pointwise(values, [max(len(v.shape) for v in values)])
    return _all(every) if reduction else every


@computes("nll_loss_forward", statistic="mean")
def nll(x, y, weight, reduction, ignore):
    # The classes are numbered by y.
    sample = ("[n] " if reduction else "n ") if len(x.shape) > 1 else ""
    return expr(f"{sample}_, {sample}, _ -> {'' if reduction else sample},", x, y, weight)


@computes("nll_loss2d_forward", statistic="mean")
def nll2d(x, y, weight, reduction, ignore):
    if reduction:
        return expr("[n] _ [h] [w], [n] [h] [w], _ -> ,", x, y, weight)
    return expr("n _ h w, n h w, _ -> n h w,", x, y, weight)


describe("_ctc_loss", "multi_margin_loss", "multilabel_margin_loss_forward", why="classes are numbered by the targets")
