"""Quantisation in pretence: entries rounded to a scale, of the tensor or of each channel."""

from __future__ import annotations

from .notation import expr
from .record import LETTERS, computes


@computes("fake_quantize_per_channel_affine_cachemask", "fake_quantize_per_channel_affine", "_fake_quantize_learnable_per_channel_affine")
def per_channel(x, scale, zero, axis, *args):
    axes = LETTERS[: len(x.shape)]
    every, axis_name = " ".join(axes), axes[axis % len(axes)]
    return expr(f"{every}, {axis_name}, {axis_name} -> {every}, {every}", x, scale, zero)


@computes("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fake_quantize_learnable_per_tensor_affine")
def per_tensor(x, scale, zero, *args):
    every = " ".join(LETTERS[: len(x.shape)])
    ones = [" ".join("1" for _ in each.shape) for each in (scale, zero)]
    return expr(f"{every}, {ones[0]}, {ones[1]} -> {every}, {every}", x, scale, zero)


@computes("_fused_moving_avg_obs_fq_helper")
def observed(x, observing, quantising, low, high, scale, zero, rate, least, most, axis, per_row=False, symmetric=False):
    """Range and scale are taken of the values: of each channel, or of all."""
    axes = [letter if per_row and i == axis % len(x.shape) else f"[{letter}]" for i, letter in enumerate(LETTERS[: len(x.shape)])]
    axis_name = axes[axis % len(axes)] if per_row else "1"
    every = " ".join(axes)
    stats = [value if value.shape and value.shape[0] == (x.shape[axis] if per_row else 1) else None for value in (low, high, scale, zero)]
    return expr(f"{every}, {axis_name}, {axis_name}, {axis_name}, {axis_name} -> {every}, {every}", x, *stats)
