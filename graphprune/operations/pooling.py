"""Maps put together, spread, padded and sampled in space, channel by channel."""

from __future__ import annotations

from .notation import Expr, Value, expr
from .record import LETTERS, computes


@computes("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
          "adaptive_max_pool2d", "adaptive_max_pool3d", "avg_pool1d", "adaptive_avg_pool1d", "max_pool2d", "mkldnn_adaptive_avg_pool2d",
          "adaptive_avg_pool2d", pools=True)  # fmt: skip
@computes("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
          "upsample_trilinear3d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d", "_upsample_nearest_exact1d",
          "_upsample_nearest_exact3d", "reflection_pad2d",
          "replication_pad2d", "reflection_pad3d", "replication_pad3d")  # fmt: skip
def pooling(x, *args, **kwargs):
    space = {2: 1, 3: 1, 4: 2, 5: 3}[len(x.shape)]
    lead = " ".join(LETTERS[: len(x.shape) - space])
    axes = lead + " _" * space
    return expr(f"{axes} -> {axes}, {axes}", x)


@computes("reflection_pad1d", "replication_pad1d")
def pad1d(x, *args):
    lead = " ".join(LETTERS[: len(x.shape) - 1])
    return expr(f"{lead} _ -> {lead} _", x)


@computes("im2col")
def unfold(x, kernel, *args):
    return expr("b c _ _ -> b (c _k) _", x, _k=kernel[0] * kernel[1])


@computes("col2im")
def fold(x, size, kernel, *args):
    return expr("b (c _k) _ -> b c _ _", x, _k=kernel[0] * kernel[1])


@computes("grid_sampler_2d")
def grid_sample(x, grid, *args):
    return expr("b c _ _, b _ _ _ -> b c _ _", x, grid)


@computes("grid_sampler_3d")
def grid_sample3d(x, grid, *args):
    return expr("b c _ _ _, b _ _ _ _ -> b c _ _ _", x, grid)


@computes("affine_grid_generator")
def affine_grid(theta, size, align):
    return expr(f"_ _ _ -> _{' _' * (len(size) - 2)} _", theta)


@computes("max_unpool2d")
def unpool2d(x, places, size):
    lead = " ".join(LETTERS[: len(x.shape) - 2])
    return expr(f"{lead} _ _, {lead} _ _ -> {lead} _ _", x, places)


@computes("max_unpool3d")
def unpool3d(x, places, *args):
    lead = " ".join(LETTERS[: len(x.shape) - 3])
    return expr(f"{lead} _ _ _, {lead} _ _ _ -> {lead} _ _ _", x, places)


@computes("fractional_max_pool2d", pools=True)
def fractional2d(x, kernel, size, samples):
    return _fractional(x, samples, 2)


@computes("fractional_max_pool3d", pools=True)
def fractional3d(x, kernel, size, samples):
    return _fractional(x, samples, 3)


def _fractional(x: Value, samples: Value, space: int) -> Expr:
    lead = " ".join(LETTERS[: len(x.shape) - space])
    axes = lead + " _" * space
    return expr(f"{axes}, {lead if len(x.shape) > space + 1 else '1 ' + lead} _ -> {axes}, {axes}", x, samples)
