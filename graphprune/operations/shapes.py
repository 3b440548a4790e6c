"""Results without values: for frequent operations on the meta device, an empty tensor of the right shape and strides.

torch's own shape functions are written in Python for many operations and take up to a millisecond each. The ones here
answer only the plain case (floating tensors of one type) and return None for any other, which is then
left to torch. That both agree is a test.

>>> x = torch.empty(1, 3, 8, 8, device="meta")
>>> operation("aten::relu").shapes["default"](x).shape
torch.Size([1, 3, 8, 8])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from .record import operation, shape

META = torch.device("meta")
Tensor = torch.Tensor

__all__ = ["new", "operation", "same"]


def dense(x: Tensor) -> bool:
    """Every element once, none between: such a tensor gives its strides to a result.

    >>> dense(torch.empty(2, 3).t()), dense(torch.empty(2, 3)[:, :2])
    (True, False)
    """
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def new(like: Tensor, size: Sequence[int]) -> Tensor:
    # With strides written out: torch.empty tries several signatures first and takes three times as long.
    return torch.empty_strided(size, strides(size), dtype=like.dtype, device=META)


def strides(size: Sequence[int]) -> list[int]:
    """Those of a contiguous tensor.

    >>> strides((2, 3, 4))
    [12, 4, 1]
    """
    steps, step = [1] * len(size), 1
    for axis in range(len(size) - 1, -1, -1):
        steps[axis] = step
        step *= size[axis] or 1
    return steps


@lru_cache
def nothing(dtype: torch.dtype) -> Tensor:
    """A result that nobody reads."""
    return torch.empty(0, dtype=dtype, device=META)


def same(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def ordered(x: Tensor) -> Tensor | None:
    """Dense, with the axes in the order in which x has them: the result of a pointwise operation. None where x repeats or shares entries.

    >>> ordered(torch.empty(2, 5, 3).transpose(0, 1)[:, :, :2]).stride()
    (2, 10, 1)
    """
    if dense(x):
        return same(x)
    size, spacing = x.shape, x.stride()
    steps = [step for step, n in zip(spacing, size, strict=True) if n > 1]
    if 0 in spacing or len(set(steps)) < len(steps):
        return None
    order, step = [0] * len(size), 1
    for axis in sorted(range(len(size)), key=lambda axis: (spacing[axis], -axis)):
        order[axis] = step
        step *= size[axis]
    return torch.empty_strided(size, order, dtype=x.dtype, device=META)


@shape("relu.default", "hardtanh.default", "gelu.default", "silu.default", "sigmoid.default", "tanh.default", "hardswish.default", "exp.default",
       "hardsigmoid.default", "leaky_relu.default", "elu.default", "mish.default", "softplus.default", "neg.default", "sqrt.default", "sin.default",
       "rsqrt.default", "abs.default", "log.default", "erf.default", "cos.default", "pow.Tensor_Scalar", "clone.default", "empty_like.default",
       "zeros_like.default", "ones_like.default", "log_sigmoid.default", "reciprocal.default", "relu6.default", "selu.default", "celu.default")  # fmt: skip
def unary(x, *args, **kwargs):
    return ordered(x) if not kwargs and x.is_floating_point() else None


@shape("relu_.default", "hardtanh_.default", "gelu_.default", "silu_.default", "sigmoid_.default", "tanh_.default", "hardswish_.default",
       "hardsigmoid_.default", "leaky_relu_.default", "elu_.default", "mish_.default", "relu6_.default")  # fmt: skip
def inplace(x, *args, **kwargs):
    return x if x.is_floating_point() else None


@shape("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "rsub.Scalar")
def binary(x, y, **kwargs):
    if not x.is_floating_point():
        return None
    if not isinstance(y, Tensor):
        return ordered(x) if type(y) in (int, float) else None
    if x.dtype != y.dtype:
        return None
    if x.shape == y.shape and x.stride() == y.stride() and dense(x):
        return same(x)
    if not (x.is_contiguous() and y.is_contiguous()) or not (x.ndim and y.ndim):
        return spread(x, y)
    long, short = (x.shape, y.shape) if x.ndim >= y.ndim else (y.shape, x.shape)
    out = list(long)
    for axis in range(1, len(short) + 1):
        a, b = long[-axis], short[-axis]
        if a != b and a != 1 and b != 1:
            return None
        out[-axis] = b if a == 1 else a
    return new(x, out)


def spread(x: Tensor, y: Tensor) -> Tensor | None:
    """The result where y is one value for each position along one axis of x, which then gives the order."""
    if y.ndim > x.ndim or y.numel() not in y.shape or not dense(x):
        return None
    fits = all(n in (1, whole) for n, whole in zip(reversed(y.shape), reversed(x.shape), strict=False))
    return same(x) if fits else None


@shape("add_.Tensor", "mul_.Tensor", "sub_.Tensor", "div_.Tensor")
def binary_inplace(x, y, **kwargs):
    return x if x.is_floating_point() and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype else None


@shape("convolution.default")
def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    size, kernel = tuple(x.shape), tuple(weight.shape)  # asked for once: a look at .shape is slow, and models have many convolutions
    space = len(size) - 2
    if transposed or not x.is_contiguous() or not weight.is_contiguous() or x.dtype != weight.dtype or len(kernel) != len(size) or space < 1:
        return None
    if size[1] != kernel[1] * groups or not len(stride) == len(padding) == len(dilation) == space:
        return None
    out = [size[0], kernel[0]]
    for n, k, s, p, d in zip(size[2:], kernel[2:], stride, padding, dilation, strict=True):
        out.append((n + 2 * p - d * (k - 1) - 1) // s + 1)
    return new(x, out) if min(out) > 0 else None


@shape("addmm.default")
def addmm(bias, x, y, **kwargs):
    fits = not kwargs and bias.ndim == 1 and bias.shape[0] in (1, y.shape[1]) and bias.dtype == x.dtype
    return mm(x, y) if fits else None


@shape("mm.default")
def mm(x, y):
    return new(x, (x.shape[0], y.shape[1])) if x.dtype == y.dtype and x.shape[1] == y.shape[0] else None


@shape("bmm.default")
def bmm(x, y):
    fits = x.dtype == y.dtype and x.shape[2] == y.shape[1] and x.shape[0] == y.shape[0]
    return new(x, (x.shape[0], x.shape[1], y.shape[2])) if fits else None


@shape("native_batch_norm.default", "_native_batch_norm_legit_no_training.default")
def batch_norm(x, weight, bias, mean, var, *rest):
    if not dense(x):
        return None
    if len(rest) == 3 and rest[0]:  # statistics of the batch, in float32 at least
        if x.numel() <= x.shape[1]:  # one value has no deviation: torch says what is wrong
            return None
        return (same(x), new(x, x.shape[1:2]), new(x, x.shape[1:2])) if x.dtype in (torch.float32, torch.float64) else None
    return same(x), nothing(x.dtype), nothing(x.dtype)


@shape("native_layer_norm.default")
def layer_norm(x, size, weight, bias, eps):
    lead = x.ndim - len(size)
    if x.dtype not in (torch.float32, torch.float64) or list(x.shape[lead:]) != list(size):
        return None
    stats = [*x.shape[:lead], *([1] * len(size))]
    return new(x, x.shape), new(x, stats), new(x, stats)  # contiguous, whatever the order of x


@shape("native_group_norm.default")
def group_norm(x, weight, bias, n, c, hxw, groups, eps):
    return (same(x), new(x, (n, groups)), new(x, (n, groups))) if x.is_contiguous() else None


@shape("_softmax.default", "_log_softmax.default", "_safe_softmax.default")
def softmax(x, dim, *args, **kwargs):
    return same(x) if x.is_contiguous() and x.is_floating_point() and not kwargs and args in ((), (False,)) else None


@shape("mean.dim", "sum.dim_IntList", "amax.default", "amin.default")
def reduction(x, dim=(), keepdim=False, **kwargs):
    if kwargs or dim is None or not len(dim) or not x.is_contiguous() or not x.is_floating_point() or not x.ndim:
        return None
    over = {d % x.ndim for d in dim}
    return new(x, [1 if a in over else n for a, n in enumerate(x.shape) if keepdim or a not in over])


@shape("cat.default")
def cat(tensors, dim=0):
    first = tensors[0]
    if not first.ndim:
        return None
    dim %= first.ndim
    size, total = list(first.shape), 0
    for x in tensors:
        if x.dtype != first.dtype or x.ndim != first.ndim or not x.is_contiguous():
            return None
        lengths = list(x.shape)
        total, lengths[dim] = total + lengths[dim], size[dim]
        if lengths != size:
            return None
    size[dim] = total
    return new(first, size)


def _window(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], ceil: bool) -> list[int] | None:
    space = len(kernel)
    if x.ndim != space + 2 or not x.is_contiguous():
        return None
    pairs = [list(numbers) * (space if len(numbers) == 1 else 1) for numbers in (stride or kernel, padding, dilation)]
    out = []
    for n, k, s, p, d in zip(x.shape[2:], kernel, *pairs, strict=True):
        count = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil else 0)) // s + 1
        out.append(count - (ceil and (count - 1) * s >= n + p))  # a window that begins behind the last entry does not count
    return [*x.shape[:2], *out] if min(out) > 0 else None


@shape("max_pool2d_with_indices.default")
def max_pool(x, kernel, stride=(), padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    size = _window(x, list(kernel) * (2 if len(kernel) == 1 else 1), stride, padding, dilation, ceil_mode)
    return (new(x, size), torch.empty(size, dtype=torch.int64, device=META)) if size else None


@shape("avg_pool2d.default")
def avg_pool(x, kernel, stride=(), padding=(0, 0), ceil_mode=False, *rest):
    size = _window(x, list(kernel) * (2 if len(kernel) == 1 else 1), stride, padding, (1, 1), ceil_mode)
    return new(x, size) if size else None


@shape("_adaptive_avg_pool2d.default")
def adaptive(x, size):
    return new(x, [*x.shape[:-2], *size]) if x.is_contiguous() and x.ndim == 4 else None


@shape("_unsafe_view.default")
def unsafe_view(x, size):
    size = list(size)
    if -1 in size:
        size[size.index(-1)] = x.numel() // max(1, -math.prod(size))
    return new(x, size) if x.is_contiguous() and math.prod(size) == x.numel() else None


@shape("embedding.default")
def embedding(weight, index, *args, **kwargs):
    return new(weight, [*index.shape, weight.shape[1]])
