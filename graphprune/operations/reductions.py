"""Sums, statistics and orders along axes: what is summed goes, what is weighed against the rest of an axis is mixed, what is ordered stays."""

from __future__ import annotations

import math
from typing import Any

from .notation import Expr, Value, expr
from .record import LETTERS, computes, describe, pointwise


def dims(dim: Any, rank: int) -> set[int]:
    """The axes that an argument names; all of them where it names none."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return set(range(rank))
    return {d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim)}


def _reduced(x: Value, dim: Any, keepdim: bool, outs: int = 1) -> Expr:
    over = dims(dim, len(x.shape))
    left = [f"[{LETTERS[i]}]" if i in over else LETTERS[i] for i in range(len(x.shape))]
    right = [("1" if i in over else LETTERS[i]) for i in range(len(x.shape)) if keepdim or i not in over]
    return expr(" ".join(left) + "->" + ",".join([" ".join(right)] * outs), x)


@computes("sum", "nansum", statistic="sum")
@computes("mean", "std", "var", statistic="mean")
@computes("amax", "amin", "prod", "any", "all", "_is_any_true", "_is_all_true", "logsumexp", "max", "min", statistic="other")
def reduction(x, dim=None, keepdim=False, **kwargs):
    if isinstance(dim, Value):
        return pointwise([x, dim], [max(len(x.shape), len(dim.shape))])
    return _reduced(x, dim, bool(keepdim), outs=2)


@computes("var_mean", "std_mean", statistic="mean")
def var_mean(x, dim=None, *, correction=None, keepdim=False):
    return _reduced(x, dim, keepdim, outs=2)


describe("any", "_is_any_true", neutral=0.0)
describe("all", "_is_all_true", "prod", neutral=1.0)
describe("amax", "max", "logsumexp", neutral=-math.inf)
describe("amin", "min", neutral=math.inf)


@computes("linalg_vector_norm", "norm", statistic="norm")
def vector_norm(x, ord=2, dim=None, keepdim=False, **kwargs):
    return _reduced(x, dim, keepdim)


@computes("_softmax", "_safe_softmax", "softmax", softmax=True)
@computes("_log_softmax", "log_softmax", softmax=True)
def softmax(x, dim, *args, **kwargs):
    axes = [LETTERS[i] for i in range(len(x.shape))]
    axes[dim] = f"[{axes[dim]}]"
    return expr(" ".join(axes) + "->" + " ".join(axes), x)


@computes("cumsum", "cumprod", "sort", "argsort", "cummax", "cummin", "logcumsumexp")
def along(x, dim=-1, *args, **kwargs):
    dim = args[0] if args and isinstance(args[0], int) and not isinstance(args[0], bool) else dim
    dim = kwargs.get("dim", dim) if isinstance(kwargs.get("dim", dim), int) else -1
    axes = " ".join("_" if i == dim % len(x.shape) else LETTERS[i] for i in range(len(x.shape)))
    return expr(f"{axes} -> {axes}, {axes}", x)


@computes("topk", chooses_from=lambda x, k, dim=-1, *args, **kwargs: (x, dim, int(k)))
def topk(x, k, dim=-1, *args, **kwargs):
    """As of a statistic: what is gone is never among the largest. What their positions are used for decides whether it may go."""
    axes = [LETTERS[i] for i in range(len(x.shape))]
    left, right = ([f"[{a}]" if i == dim % len(axes) else a for i, a in enumerate(axes)], ["_" if i == dim % len(axes) else a for i, a in enumerate(axes)])
    return expr(f"{' '.join(left)} -> {' '.join(right)}, {' '.join(right)}", x)


def _extreme(x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> tuple[Value, int, int] | None:
    """The axis along which one position is chosen, if it is one axis."""
    if len(x.shape) == 1 and dim is None:
        return x, 0, 1
    return (x, dim, 1) if type(dim) is int and x.shape else None


@computes("argmax", "argmin", chooses_from=_extreme)
def position(x, dim=None, keepdim=False):
    """Like ``topk`` of one; a position in the order of several axes keeps all of them."""
    if _extreme(x, dim) is None:
        return ordered(x, dim, keepdim)
    return _reduced(x, dim, bool(keepdim))


@computes("median", "nanmedian", "mode", "kthvalue")
def ordered(x, *args, **kwargs):
    """A value, or a position, in the order along one axis, which stays; without an axis, of all."""
    numbers = [arg for arg in args if type(arg) is not bool]
    dim, keepdim = kwargs.get("dim", numbers[-1] if numbers else None), kwargs.get("keepdim", any(arg is True for arg in args))
    over = dims(dim, len(x.shape))
    axes = ["_" if i in over else LETTERS[i] for i in range(len(x.shape))]
    right = " ".join("1" if i in over else axis for i, axis in enumerate(axes) if keepdim or i not in over)
    return expr(f"{' '.join(axes)} -> {right}, {right}", x)


@computes("aminmax", statistic="other")
def aminmax(x, *, dim=None, keepdim=False):
    return _reduced(x, dim, keepdim, outs=2)


@computes("renorm")
def renorm(x, p, dim, maxnorm):
    axes = " ".join(LETTERS[i] if i == dim % len(x.shape) else f"[{LETTERS[i]}]" for i in range(len(x.shape)))
    return expr(f"{axes} -> {axes}", x)


@computes("_cdist_forward", "_euclidean_dist", statistic="sum")
def distances(x, y, *args):
    rank = max(len(x.shape), len(y.shape))
    lead = LETTERS[: rank - 2]
    left, right = (" ".join(lead[rank - len(each.shape) :]) for each in (x, y))
    return expr(f"{left} n [x], {right} m [x] -> {' '.join(lead)} n m", x, y)


@computes("_pdist_forward", statistic="sum")
def pairs(x, *args):
    return expr("_ [x] -> _", x)


@computes("dist", statistic="sum")
def dist(x, y, *args):
    every = pointwise([x, y], [max(len(x.shape), len(y.shape))])
    left = ", ".join(" ".join(f"[{axis}]" for axis in part.split()) for part in every.text.partition("->")[0].split(","))
    return expr(f"{left} ->", x, y)


@computes("tril", "triu")
def triangle(x, *args):
    lead = " ".join(LETTERS[: len(x.shape) - 2])
    return expr(f"{lead} _ _ -> {lead} _ _", x)


describe("max", "min", chooses_from=_extreme)
describe("sum", "linalg_vector_norm", "norm", planned=True)
describe("sort", "argsort", orders=True)
describe("cumsum", accumulates=True)
