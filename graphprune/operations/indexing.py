"""Positions that a tensor names, to be read or written: the axis they count stays, or goes with the buffer that holds them (``tracing/picks.py``)."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import BadRule
from .notation import Expr, Value, expr
from .record import LETTERS, computes, describe

MASKS = (torch.bool, torch.uint8)


def but(rank: int, *dims: int) -> list[str]:
    """A letter for each axis, and ``_`` for those whose positions are counted.

    >>> but(3, -1)
    ['a', 'b', '_']
    """
    counted = {dim % max(rank, 1) for dim in dims}
    return ["_" if i in counted else LETTERS[i] for i in range(rank)]


@computes("embedding", table=True)
def embedding(weight, index, *args, **kwargs):
    lead = " _" * len(index.shape)
    return expr(f"_ e,{lead} -> {lead} e", weight, index)


@computes("gather")
def gather(x, dim, index, **kwargs):
    axes = " ".join(but(len(x.shape), dim))
    return expr(f"{axes}, {axes} -> {axes}", x, index)


@computes("index_select", picks=True)
def index_select(x, dim, index):
    axes = " ".join(but(len(x.shape), dim))
    return expr(f"{axes}, _ -> {axes}", x, index)


def _indexed(axes: list[str], dims: list[int], rank: int) -> list[str]:
    """The axes of what is taken at positions along some axes: those of the positions stand where these were, or first if they were not side by side."""
    rest = [axis for i, axis in enumerate(axes) if i not in dims]
    at = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    return rest[:at] + ["_"] * rank + rest[at:]


@computes("index", picks=True)
def index(x: Value, indices: list[Any]) -> Expr:
    dims = [i for i, v in enumerate(indices) if isinstance(v, Value)]
    if any(indices[i].dtype in MASKS for i in dims):
        if len(dims) > 1:
            raise BadRule("several masks, or masks beside positions")
        over = range(dims[0], dims[0] + len(indices[dims[0]].shape))
        axes = but(len(x.shape), *over)
        return expr(f"{' '.join(axes)}, {' _' * len(over)} -> {' '.join(_indexed(axes, list(over), 1))}", x, indices[dims[0]])
    axes, picked = but(len(x.shape), *dims), [indices[i] for i in dims]
    fixed = "".join("," + " _" * len(v.shape) for v in picked)
    return expr(f"{' '.join(axes)}{fixed} -> {' '.join(_indexed(axes, dims, max(len(v.shape) for v in picked)))}", x, *picked)


@computes("scatter", "scatter_add", "scatter_reduce")
def scatter(x, dim, index, source=None, *args, **kwargs):
    """Written at positions along one axis; along the others every tensor has the same, or fewer, which are then counted too."""
    operands = [x, index, *([source] if isinstance(source, Value) else [])]
    rank = len(x.shape)
    shorter = [axis for axis in range(rank) if any(len(each.shape) == rank and each.shape[axis] != x.shape[axis] for each in operands)]
    axes = " ".join(but(rank, dim, *shorter))
    return expr(f"{', '.join([axes] * len(operands))} -> {axes}", *operands)


@computes("index_add", "index_copy", "index_reduce")
def index_add(x, dim, index, source, *args, **kwargs):
    axes = " ".join(but(len(x.shape), dim))
    return expr(f"{axes},{' _' * len(index.shape)}, {axes} -> {axes}", x, index, source)


@computes("index_fill")
def index_fill(x, dim, index, value):
    axes = " ".join(but(len(x.shape), dim))
    return expr(f"{axes},{' _' * len(index.shape)} -> {axes}", x, index)


@computes("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(x, indices, values, *args, **kwargs):
    """Positions along some axes are written; a mask may be cut with what it masks, if what is written does not number the places it finds."""
    rank, indexed = len(x.shape), [(i, v) for i, v in enumerate(indices) if isinstance(v, Value)]
    if len(indexed) == 1 and indexed[0][1].dtype in MASKS:
        return _masked(x, indexed[0][0], indexed[0][1], values)
    if any(v.dtype in MASKS for _, v in indexed):
        raise BadRule("several masks, or masks beside positions")
    axes = but(rank, *(i for i, _ in indexed))
    patterns = _indexed(axes, [i for i, _ in indexed], max(len(v.shape) for _, v in indexed))
    written = " ".join(patterns[len(patterns) - len(values.shape) :])
    fixed = "".join("," + " _" * len(v.shape) for _, v in indexed)
    return expr(f"{' '.join(axes)}{fixed}, {written} -> {' '.join(axes)}", x, *(v for _, v in indexed), values)


def _masked(x: Value, start: int, mask: Value, values: Value) -> Expr:
    rank, over = len(x.shape), len(mask.shape)
    behind = rank - start - over
    numbered = len(values.shape) > behind and values.shape[len(values.shape) - behind - 1] > 1
    axes = but(rank, *range(start, start + over)) if numbered else but(rank)
    pattern = [*axes[:start], "_" if numbered else "1", *axes[rank - behind :]] if behind else [*axes[:start], "_" if numbered else "1"]
    written = pattern[len(pattern) - len(values.shape) :]
    return expr(f"{' '.join(axes)}, {' '.join(axes[start : start + over])}, {' '.join(written)} -> {' '.join(axes)}", x, mask, values)


@computes("segment_reduce")
def segment_reduce(data, reduce, *, lengths=None, indices=None, offsets=None, axis=0, **kwargs):
    """Rows are put together as their lengths or offsets say; what stands behind them is each by itself."""
    axes = " ".join(but(len(data.shape), *range(axis + 1)))
    division = lengths if isinstance(lengths, Value) else offsets
    assert isinstance(division, Value)
    return expr(f"{axes},{' _' * len(division.shape)} -> {axes}", data, division)


@computes("_sparse_addmm")
def sparse_addmm(base, sparse, dense, **kwargs):
    """The neighbours of each row are added up; what a sparse matrix joins stays as it is."""
    return expr("_ c, _ _, _ c -> _ c", base, sparse, dense)


@computes("select_scatter")
def select_scatter(x, source, dim, index):
    axes = but(len(x.shape), dim)
    inner = [axis for i, axis in enumerate(axes) if i != dim % len(axes)]
    return expr(f"{' '.join(axes)}, {' '.join(inner)} -> {' '.join(axes)}", x, source)


@computes("slice_scatter")
def slice_scatter(x, source, dim=0, *args, **kwargs):
    axes = " ".join(but(len(x.shape), dim))
    return expr(f"{axes}, {axes} -> {axes}", x, source)


@computes("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(weight, index, offsets, scale=False, mode=0, sparse=False, each=None, *args, **kwargs):
    return expr("_ e, _, _, _ -> _ e", weight, index, offsets, each if isinstance(each, Value) else None)


@computes("embedding_renorm")
def embedding_renorm(weight, index, *args):
    return expr(f"_ [e],{' _' * len(index.shape)} -> _ [e]", weight, index)


@computes("unfold")
def windows(x, dim, size, step):
    axes = " ".join(but(len(x.shape), dim))
    return expr(f"{axes} -> {axes} _", x)


@computes("diagonal")
def diagonal(x, offset=0, dim1=0, dim2=1):
    axes = but(len(x.shape), dim1, dim2)
    return expr(f"{' '.join(axes)} -> {' '.join(axis for axis in axes if axis != '_')} _", x)


@computes("diag_embed")
def diag_embed(x, offset=0, dim1=-2, dim2=-1):
    lead = LETTERS[: len(x.shape) - 1]
    dims = {dim % (len(x.shape) + 1) for dim in (dim1, dim2)}
    rest = iter(lead)
    return expr(f"{' '.join(lead)} _ -> {' '.join('_' if i in dims else next(rest) for i in range(len(x.shape) + 1))}", x)


@computes("bucketize")
def bucketize(x, boundaries, *args, **kwargs):
    if not isinstance(x, Value):
        raise BadRule("a number among boundaries")
    axes = " ".join(but(len(x.shape)))
    return expr(f"{axes}, _ -> {axes}", x, boundaries)


@computes("searchsorted")
def searchsorted(boundaries, x, *args, **kwargs):
    if not isinstance(x, Value):
        raise BadRule("a number among boundaries")
    axes = but(len(x.shape), -1) if len(boundaries.shape) > 1 else but(len(x.shape))
    return expr(f"{' '.join(axes) if len(boundaries.shape) > 1 else '_'}, {' '.join(axes)} -> {' '.join(axes)}", boundaries, x)


@computes("isin")
def isin(x, among, *args, **kwargs):
    if not isinstance(x, Value) or not isinstance(among, Value):
        raise BadRule("a number among others")
    axes = " ".join(but(len(x.shape)))
    return expr(f"{axes},{' _' * len(among.shape)} -> {axes}", x, among)


# How many there are depends on the values.
describe("multinomial", why="positions are drawn at random")
describe("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", why="as many results as the values have it")
describe("take", "put", why="entries are numbered over all axes at once")

describe("nonzero", finds=True)
describe("bincount", "histc", tallies=True)
describe("gather", "index_select", addresses=lambda x, dim, index, **kwargs: [(x, dim, index)])
describe("scatter", "scatter_add", "scatter_reduce", addresses=lambda x, dim, index, *args, **kwargs: [(x, dim, index)], writes_at=True)
describe("index_add", addresses=lambda x, dim, index, source, **kwargs: [(x, dim, index)], writes_at=True)
describe("embedding", addresses=lambda weight, index, *args, **kwargs: [(weight, 0, index)])
describe("index", addresses=lambda x, indices: [(x, dim, index) for dim, index in enumerate(indices) if isinstance(index, Value)])
