"""The same positions of a kernel removed in every filter, and what that can become: a smaller kernel, a product, or a mask.

``group`` chooses among all (channel, tap) pairs; whatever whole rows and columns then go leaves a smaller stock
convolution. ``group:box`` chooses rows and columns from the start, so that the result is always one. Pairs that form no
box become a matrix product with fewer columns, but only where a measurement on this machine says that it is faster.

>>> [box for box in boxes((3, 3)) if len(box[0]) * len(box[1]) == 6][:2]
[((0, 1), (0, 1, 2)), ((0, 2), (0, 1, 2))]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..cutting.kernels import apply_kernel, plain, steps
from ..cutting.parts import Part, pack
from ..timing.measure import clock_for, interleave
from ..tracing.copies import duplicate
from ..tracing.graph import Graph
from .ranking import share
from .weights import Weight

Box = tuple[tuple[int, ...], ...]


def boxes(sizes: tuple[int, ...]) -> list[Box]:
    """Every choice of evenly spaced taps along each axis: what a convolution with stride, padding and dilation can express."""
    return list(itertools.product(*(_even(size) for size in sizes)))


def _even(size: int) -> list[tuple[int, ...]]:
    choices = {tuple(range(a, b + 1, step)) for a in range(size) for b in range(a, size) for step in range(1, size) if (b - a) % step == 0}
    return sorted(choices or {(0,)}, key=lambda taps: (len(taps), taps))


def best_box(scores: torch.Tensor, ratio: float, name: str) -> Box:
    """The box with the highest sum of scores among the largest that leave at least the asked share of taps out.

    ``scores``: one per tap, of the kernel's shape. A larger ratio never leaves a larger box.
    """
    limit = scores.numel() - share(scores.numel(), ratio, name)
    area = lambda box: int(torch.Size([len(taps) for taps in box]).numel())  # noqa: E731
    fits = [box for box in boxes(tuple(scores.shape)) if area(box) <= limit]
    largest = max(map(area, fits))
    return max((box for box in fits if area(box) == largest), key=lambda box: float(_inside(scores, box).sum()))


def _inside(scores: torch.Tensor, box: Box) -> torch.Tensor:
    for axis, taps in enumerate(box):
        scores = scores.index_select(axis, torch.tensor(taps, device=scores.device))
    return scores


def box_of(columns: torch.Tensor) -> Box | None:
    """The box of taps that a choice of (channel, tap) pairs is, when every channel keeps the same evenly spaced rows and columns."""
    if not (columns == columns[:1]).all() or not columns.any():
        return None
    taps = columns[0]
    box = tuple(tuple(taps.movedim(axis, 0).reshape(taps.shape[axis], -1).any(1).nonzero().ravel().tolist()) for axis in range(taps.ndim))
    full = int(taps.sum()) == int(torch.Size([len(along) for along in box]).numel())
    return box if full and all(steps(along) for along in box) else None


def realise(weight: Weight, keep: torch.Tensor, graph: Graph, model: nn.Module, clock: Callable[..., Any] | None = None) -> tuple[Part, str]:
    """The best way to have only the pairs of ``keep`` (the weight's shape), and a line that says which and why."""
    conv = model.get_submodule(weight.name.rpartition(".")[0])
    columns = keep[0]
    if not plain(conv) or not (keep == keep[:1]).all():
        why = "its groups keep different pairs" if plain(conv) else f"{type(conv).__name__} is not a plain convolution"
        return Part("mask", weight.name, pack(keep)), f"masked: {why}"
    box = box_of(columns)
    if box:
        return Part("kernel", weight.name, box), f"a dense kernel of {' x '.join(str(len(taps)) for taps in box)}"
    if weight.kernel != 2 or weight.groups != 1:
        return Part("mask", weight.name, pack(keep)), "masked: a product of its columns is written for 2-d convolutions with one group"
    part = Part("columns", weight.name, pack(columns))
    before, after = (clock or times)(conv, part, graph.nodes[weight.call].args[0].shape)
    text = f"{after * 1e3:.3f} ms as a product of its columns, {before * 1e3:.3f} ms as the convolution"
    if after < 0.95 * before:
        return part, f"a product of {int(columns.sum())} columns ({text})"
    return Part("mask", weight.name, pack(keep)), f"masked: {text}"


def times(conv: nn.Module, part: Part, shape: tuple[int, ...], seconds: float = 0.5) -> tuple[float, float]:
    """Median seconds of the convolution and of its product with fewer columns, measured in turn on an input of ``shape``."""
    stock, product = duplicate(conv, {}), nn.Sequential(duplicate(conv, {}))
    weight = conv.get_parameter("weight")
    apply_kernel(product, Part(part.kind, "0.weight", part.data), tuple(weight.shape), {})
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    clock = clock_for(x.device, torch.get_num_threads())[1]
    with torch.no_grad():
        rows = interleave([lambda: stock(x), lambda: product(x)], clock, seconds, 0.02)
    return float(np.median(rows[:, 0])), float(np.median(rows[:, 1]))
