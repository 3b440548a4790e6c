"""The laws behind a rule's text, checked against the operation itself: :func:`check_rule`.

A *kept* axis commutes with cutting, ``op(cut x) == cut op(x)``; a *summed* axis does not care about zeros,
``op(cut x) == op(zeroed x)``; a *mixed* axis only has to give the shapes that cutting promises.

>>> check_rule(torch.mm, "n i, i o -> n o", torch.randn(3, 4), torch.randn(4, 5))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..errors import BadRule
from .notation import Axes, Expr, Value, at, checked, parse, result_place


def check_rule(function: Callable[..., Any], text: str, *operands: torch.Tensor, seed: int = 0, cut: Callable[..., Any] | None = None, **sizes: int) -> None:
    """Check every axis of a rule on the given tensors (float64 is best); raises BadRule with the place that does not fit, or the axis that breaks its law.

    ``sizes`` are factors that shapes do not tell (``g=2``); ``cut(axis, count)`` returns the function to call when the
    axis is cut to ``count`` (for operations that are told their sizes).
    """
    checked(Expr(text, tuple([Value(tuple(tensor.shape)) for tensor in operands]), sizes), "the rule")
    lefts, rights = parse(text)
    lengths = _lengths(lefts, operands, sizes)
    try:
        whole = function(*operands)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise BadRule(f"{text!r}: the operation does not run on the given tensors: {error}") from error
    if len(rights[0]) != whole.ndim:
        raise BadRule(at(text, result_place(text, 0), f"the rule names {len(rights[0])} axes of a result of shape {tuple(whole.shape)}"))
    generator = torch.Generator().manual_seed(seed)
    for name, size in lengths.items():
        if size < 2 or name.startswith("_"):
            continue
        stay = torch.ones(size, dtype=torch.bool)
        stay[torch.randperm(size, generator=generator)[: max(1, size // 2)]] = False
        _check_axis(_Axis(text, name, stay, lengths), function, cut(name, int(stay.sum())) if cut else function, operands, whole)


class _Axis(NamedTuple):
    """One axis of a rule, which of its positions stay, and the lengths of all axes."""

    text: str
    name: str
    stay: torch.Tensor
    lengths: dict[str, int]


def _check_axis(axis: _Axis, function: Callable[..., Any], cut_function: Callable[..., Any], operands: tuple[torch.Tensor, ...], whole: torch.Tensor) -> None:
    """The law of one axis: a kept one commutes with cutting, a summed one does not care about zeros; of a mixed one only the shapes are asked."""
    text, name = axis.text, axis.name
    lefts, rights = parse(text)
    try:
        small = cut_function(*(_cut(tensor, axes, axis) for tensor, axes in zip(operands, lefts, strict=True)))
    except (RuntimeError, IndexError, ValueError) as error:
        raise BadRule(f"{text!r}: cutting {name!r} does not run: {error}") from error
    names = {each for axes in rights for dim in axes for each in dim}
    kept = name in names or f"[{name}]" in names
    wide = whole if kept else function(*(_zero(tensor, axes, axis) for tensor, axes in zip(operands, lefts, strict=True)))
    try:
        wanted = _cut(wide, rights[0], axis) if kept else wide
    except (IndexError, RuntimeError) as error:
        raise BadRule(f"{text!r}: the result has shape {tuple(wide.shape)} and no such axis {name!r}") from error
    if small.shape != wanted.shape:
        raise BadRule(f"{text!r}: cutting {name!r} gives shape {tuple(small.shape)}, the rule says {tuple(wanted.shape)}")
    mixed = any(f"[{name}]" in dim for axes in (*lefts, *rights) for dim in axes)
    if not mixed and not torch.allclose(small, wanted, rtol=1e-5, atol=1e-8):
        raise BadRule(f"{text!r}: axis {name!r} breaks its law by {float((small - wanted).abs().max()):.1e}")


def _lengths(lefts: tuple[Axes, ...], operands: tuple[torch.Tensor, ...], sizes: dict[str, int]) -> dict[str, int]:
    lengths = dict(sizes)
    for axes, tensor in zip(lefts, operands, strict=True):
        for dim, group in enumerate(axes):
            names = [name.strip("[]") for name in group]
            unknown = [name for name in names if name not in lengths and name != "_"]
            known = 1
            for name in names:
                known *= lengths.get(name, 1)
            for name in unknown[:1]:
                lengths[name] = tensor.shape[dim] // known
    return lengths


def _stays(group: tuple[str, ...], axis: _Axis, size: int) -> torch.Tensor:
    """Which positions stay along a dimension that a group of axes makes up."""
    mask = torch.ones(1, dtype=torch.bool)
    for name in (factor.strip("[]") for factor in group):
        part = axis.stay if name == axis.name else torch.ones(axis.lengths.get(name, size), dtype=torch.bool)
        mask = (mask[:, None] & part[None]).reshape(-1)
    return mask


def _along(tensor: torch.Tensor, axes: Axes, axis: _Axis) -> Iterator[tuple[int, torch.Tensor]]:
    """The dimensions of a tensor that an axis is in, and which of their positions stay; one of length 1 is broadcast."""
    for dim, group in enumerate(axes):
        if any(name.strip("[]") == axis.name for name in group) and tensor.shape[dim] > 1:
            yield dim, _stays(group, axis, tensor.shape[dim])


def _cut(tensor: torch.Tensor, axes: Axes, axis: _Axis) -> torch.Tensor:
    small = tensor
    for dim, mask in _along(tensor, axes, axis):
        small = small.index_select(dim, mask.nonzero().ravel())
    return small


def _zero(tensor: torch.Tensor, axes: Axes, axis: _Axis) -> torch.Tensor:
    zeroed = tensor
    for dim, mask in _along(tensor, axes, axis):
        zeroed = zeroed * mask.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)]).to(tensor.dtype)
    return zeroed
