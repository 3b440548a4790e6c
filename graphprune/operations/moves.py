"""Operations that only move entries: they are applied to the label arrays themselves.

Each function takes the arrays of a tensor (length 1 where labels do not vary), its shape, and the operation's own
arguments, and returns the arrays of every result.

>>> reshape(np.arange(6).reshape(1, 6), (4, 6), (4, 2, 3)).shape
(1, 2, 3)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .labels import Array, compact
from .record import describe, move


def reshape(array: Array, shape: Sequence[int], new: Sequence[int]) -> Array:
    """Reshape a field; only the axes that are really regrouped are spread out."""
    out: list[int] = []
    full = list(array.shape)
    i = j = 0
    while i < len(shape) or j < len(new):
        a, b, left, right = i, j, 1, 1
        if i < len(shape):
            left, i = shape[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * shape[i], i + 1
            else:
                right, j = right * new[j], j + 1
        if all(array.shape[k] == 1 for k in range(a, i)):
            out += [1] * (j - b)
        else:
            full[a:i] = shape[a:i]
            out += new[b:j]
    return compact(np.broadcast_to(array, full).reshape(out))


def _wrap(dim: int, rank: int) -> int:
    return dim % max(rank, 1)


@move("_unsafe_view", unmade=True, regroups=True)
@move("view", "_reshape_alias", "reshape", "view_copy", "squeeze", "unsqueeze", "flatten", "squeeze_", "unsqueeze_", regroups=True)
def _view(array, shape, out, *args, **kwargs):
    return [reshape(array, shape, out[0])]


@move("permute")
def _permute(array, shape, out, dims):
    return [array.transpose([_wrap(d, len(shape)) for d in dims])]


@move("transpose", "transpose_")
def _transpose(array, shape, out, dim0, dim1):
    return [array.swapaxes(_wrap(dim0, len(shape)), _wrap(dim1, len(shape)))]


@move("t", "t_")
def _t(array, shape, out):
    return [array.T]


@move("alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "to", "positive", "conj", "_conj", "resolve_conj",
      stays=True)  # fmt: skip
@move("zeros_like", "zero_")
@move("empty_like", "ones_like", "full_like", "rand_like", "randn_like", "bernoulli", "fill_", "uniform_", "normal_", "bernoulli_", "fill",
      "exponential_", "log_normal_", "cauchy_", "geometric_", "random_", "randint_like", fills=True)  # fmt: skip
@move("native_dropout", stays=True, drops=True)
def _same(array, shape, out, *args, **kwargs):
    return [array for _ in out]


@move("expand")
def _expand(array, shape, out, *args, **kwargs):
    return [array.reshape((1,) * (len(out[0]) - array.ndim) + array.shape)]


@move("flip")
def _flip(array, shape, out, dims):
    return [np.flip(array, tuple(_wrap(d, len(shape)) for d in dims))]


@move("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "split_with_sizes_copy", part=True)
def _split(array, shape, out, sizes, dim=0):
    dim = _wrap(dim, len(shape))
    if array.shape[dim] == 1:
        return [array for _ in out]
    ends = np.cumsum([size[dim] for size in out])
    return [compact(part) for part in np.split(array, ends[:-1], axis=dim)]


@move("slice", part=True, any_size=lambda *args, **kwargs: True)
def _slice(array, shape, out, dim=0, start=None, end=None, step=1):
    dim = _wrap(dim, len(shape))
    if array.shape[dim] == 1:
        return [array]
    index = [slice(None)] * array.ndim
    index[dim] = slice(start, end, step)
    return [compact(array[tuple(index)])]


@move("repeat", "tile")
def _repeat(array, shape, out, repeats):
    array = array.reshape((1,) * (len(repeats) - array.ndim) + array.shape)
    times = [n if size > 1 else 1 for n, size in zip(repeats, array.shape, strict=True)]
    return [np.tile(array, times)]


@move("roll")
def _roll(array, shape, out, shifts, dims=()):
    for shift, dim in zip(shifts, dims, strict=True):
        array = np.roll(array, shift, axis=dim)
    return [array]


@move("pixel_shuffle")
def _pixel_shuffle(array, shape, out, factor):
    *lead, c, h, w = shape
    wide = reshape(array, shape, (*lead, c // factor**2, factor, factor, h, w))
    n = len(lead)
    moved = wide.transpose([*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return [reshape(moved, (*lead, c // factor**2, h, factor, w, factor), out[0])]


@move("pixel_unshuffle")
def _pixel_unshuffle(array, shape, out, factor):
    *lead, c, h, w = shape
    wide = reshape(array, shape, (*lead, c, h // factor, factor, w // factor, factor))
    n = len(lead)
    moved = wide.transpose([*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return [reshape(moved, (*lead, c, factor, factor, h // factor, w // factor), out[0])]


@move("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(array, shape, out, groups):
    b, c, *space = shape
    parts = reshape(array, shape, (b, groups, c // groups, *space)).swapaxes(1, 2)
    return [reshape(parts, (b, c // groups, groups, *space), out[0])]


@move("rot90")
def _rot90(array, shape, out, k=1, dims=(0, 1)):
    first, second = dims
    return [np.rot90(array, k, (_wrap(first, len(shape)), _wrap(second, len(shape))))]


describe("as_strided", why="the same memory in another layout")
describe("alias", regroups=True)
describe("clone", fused=True)
describe("empty_like", unmade=True)
describe("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", shape_only=True)
describe("fill", "fill_", puts=True)

describe(*"t transpose permute view reshape _unsafe_view flatten unsqueeze squeeze alias detach clone contiguous".split(), planned=True)
