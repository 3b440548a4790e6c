"""The rows of a linear fit out of the tensors of a run: what a weight reads and writes, at some of the output positions.

A convolution reads the taps of its kernel around each position (im2col, gathered at the sampled positions only); positions
beside each other say nearly the same, so a few thousand rows for each repair suffice. The same positions are taken from
every tensor of a site, in both models.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .sites import Scale, Site

Tensor = torch.Tensor


def outputs(site: Site, x_shape: tuple[int, ...], kernel: tuple[int, ...]) -> list[int]:
    """How many output positions a convolution has along each axis of space."""
    stride, padding, dilation = geometry(site)
    if site.more is not None:
        lengths = zip(x_shape[2:], kernel, stride, padding, dilation, site.more, strict=True)
        return [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in lengths]
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x_shape[2:], kernel, stride, padding, dilation, strict=True)]


def chosen(site: Site | Scale, every: int, share: float, at_least: int) -> Tensor | None:
    """Some of the output positions of a batch (None: all): pixels of every image, or rows of a flattened batch."""
    count = max(at_least, math.ceil(every * share))
    if count >= every:
        return None
    generator = torch.Generator().manual_seed(site.step)
    return torch.randperm(every, generator=generator)[:count].sort().values


def written(site: Site, y: Tensor, at: Tensor | None) -> Tensor:
    """The outputs at the positions, (rows, outputs)."""
    if site.shape is None:
        flat = y.reshape(-1, y.shape[-1])
        return flat.clone() if at is None else flat[at.to(y.device)]
    flat = y.flatten(2)
    flat = flat if at is None else flat[:, :, at.to(y.device)]
    return flat.transpose(1, 2).clone(memory_format=torch.contiguous_format).reshape(-1, y.shape[1])  # a copy: the model may write over it


def read(site: Site, x: Tensor, kernel: tuple[int, ...], at: Tensor | None, groups: int = 1) -> Tensor:
    """The inputs at the positions, (groups, rows, inputs of a group x taps), in the order of the weight's entries.

    >>> site = Site(0, "w", None, None, None, False, ([1], [1], [1]), None, None)
    >>> read(site, torch.tensor([[[1.0, 2.0, 3.0]]]), (3,), None)[0].tolist()
    [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 0.0]]
    """
    if site.shape is None:
        flat = x.reshape(-1, x.shape[-1])
        return (flat.clone() if at is None else flat[at.to(x.device)])[None]
    index = sources(site, tuple(x.shape), kernel, at)
    values = torch.nn.functional.pad(x.flatten(2), (0, 1))[:, :, index.to(x.device)]  # (n, channels, positions, taps); what lies outside is zero
    n, channels, positions = values.shape[:3]
    values = values.reshape(n, groups, channels // groups, positions, -1).permute(1, 0, 3, 2, 4)
    return values.reshape(groups, n * positions, -1)


def sources(site: Site, shape: tuple[int, ...], kernel: tuple[int, ...], at: Tensor | None) -> Tensor:
    """For each output position and each tap of the kernel the input position that is read, (positions, taps); one past the last where there is none.

    >>> site = Site(0, "w", None, None, None, False, ([2], [0], [1]), None, None, more=[0])
    >>> sources(site, (1, 1, 2), (2,), None).tolist()
    [[0, 2], [2, 0], [1, 2], [2, 1]]
    """
    stride, padding, dilation = geometry(site)
    outs, sizes = outputs(site, shape, kernel), shape[2:]
    rest = torch.arange(math.prod(outs)) if at is None else at.cpu()
    taps = torch.arange(math.prod(kernel))
    index = torch.zeros(len(rest), len(taps), dtype=torch.long)
    there = torch.ones_like(index, dtype=torch.bool)
    unit = 1
    for size, k, s, p, d, out in reversed(list(zip(sizes, kernel, stride, padding, dilation, outs, strict=True))):
        position, offset = (rest % out)[:, None], (taps % k * d)[None]
        if site.more is None:
            source = position * s - p + offset
        else:  # the output is where the input stands, s apart, plus the tap
            source = position + p - offset
            there &= source % s == 0
            source = source.div(s, rounding_mode="floor")
        there &= (source >= 0) & (source < size)
        index += source * unit
        rest, taps, unit = rest // out, taps // k, unit * size
    return torch.where(there, index, unit)


def geometry(site: Site) -> tuple[list[Any], list[Any], list[Any]]:
    """Stride, padding and dilation of a site that is a convolution."""
    assert site.shape is not None
    return site.shape
