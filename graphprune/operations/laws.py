"""The laws behind a rule's text, checked against the operation itself: :func:`check_rule`.

A *kept* axis commutes with cutting, ``op(cut x) == cut op(x)``; a *summed* axis does not care about zeros,
``op(cut x) == op(zeroed x)``; a *mixed* axis only has to give the shapes that cutting promises.

>>> check_rule(torch.mm, "n i, i o -> n o", torch.randn(3, 4), torch.randn(4, 5))
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import BadRule
from .notation import Axes, Expr, Value, at, checked, parse, result_place


def check_rule(function: Callable, text: str, *given: torch.Tensor, seed: int = 0, cut: Callable | None = None, **sizes: int) -> None:
    """Check every axis of a rule on the given tensors (float64 is best); raises BadRule with the place that does not fit, or the axis that breaks its law.

    ``sizes`` are factors that shapes do not tell (``g=2``); ``cut(axis, count)`` returns the function to call when the
    axis is cut to ``count`` (for operations that are told their sizes).
    """
    checked(Expr(text, tuple([Value(tuple(tensor.shape)) for tensor in given]), sizes), "the rule")
    lefts, rights = parse(text)
    lengths = _lengths(lefts, given, sizes)
    kept = {name for axes in rights for dim in axes for name in dim}
    try:
        whole = function(*given)
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
        call = cut(name, int(stay.sum())) if cut else function
        try:
            small = call(*(_cut(t, axes, name, stay, lengths) for t, axes in zip(given, lefts, strict=True)))
        except (RuntimeError, IndexError, ValueError) as error:
            raise BadRule(f"{text!r}: cutting {name!r} does not run: {error}") from error
        mixed = any(f"[{name}]" in dim for axes in (*lefts, *rights) for dim in axes)
        if name in kept or f"[{name}]" in kept:
            wide = whole
        else:
            wide = function(*(_zero(t, axes, name, stay, lengths) for t, axes in zip(given, lefts, strict=True)))
        try:
            wanted = _cut(wide, rights[0], name, stay, lengths) if name in kept or f"[{name}]" in kept else wide
        except (IndexError, RuntimeError) as error:
            raise BadRule(f"{text!r}: the result has shape {tuple(wide.shape)} and no such axis {name!r}") from error
        if small.shape != wanted.shape:
            raise BadRule(f"{text!r}: cutting {name!r} gives shape {tuple(small.shape)}, the rule says {tuple(wanted.shape)}")
        if not mixed and not torch.allclose(small, wanted, rtol=1e-5, atol=1e-8):
            raise BadRule(f"{text!r}: axis {name!r} breaks its law by {float((small - wanted).abs().max()):.1e}")


def _lengths(lefts: tuple[Axes, ...], given: tuple[torch.Tensor, ...], sizes: dict[str, int]) -> dict[str, int]:
    lengths = dict(sizes)
    for axes, tensor in zip(lefts, given, strict=True):
        for dim, group in enumerate(axes):
            names = [name.strip("[]") for name in group]
            unknown = [name for name in names if name not in lengths and name != "_"]
            known = 1
            for name in names:
                known *= lengths.get(name, 1)
            for name in unknown[:1]:
                lengths[name] = tensor.shape[dim] // known
    return lengths


def _stays(group: tuple[str, ...], name: str, stay: torch.Tensor, lengths: dict[str, int], size: int) -> torch.Tensor:
    mask = torch.ones(1, dtype=torch.bool)
    for axis in group:
        part = stay if axis.strip("[]") == name else torch.ones(lengths.get(axis.strip("[]"), size), dtype=torch.bool)
        mask = (mask[:, None] & part[None]).reshape(-1)
    return mask


def _cut(tensor: torch.Tensor, axes: Axes, name: str, stay: torch.Tensor, lengths: dict[str, int]) -> torch.Tensor:
    for dim, group in enumerate(axes):
        if any(axis.strip("[]") == name for axis in group):
            if tensor.shape[dim] > 1:  # length 1: broadcast
                tensor = tensor.index_select(dim, _stays(group, name, stay, lengths, tensor.shape[dim]).nonzero().ravel())
    return tensor


def _zero(tensor: torch.Tensor, axes: Axes, name: str, stay: torch.Tensor, lengths: dict[str, int]) -> torch.Tensor:
    for dim, group in enumerate(axes):
        if any(axis.strip("[]") == name for axis in group):
            if tensor.shape[dim] == 1:
                continue
            mask = _stays(group, name, stay, lengths, tensor.shape[dim])
            tensor = tensor * mask.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)]).to(tensor.dtype)
    return tensor
