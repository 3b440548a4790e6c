"""What the sizes given to a call have to be: :func:`calls_of` writes them down, with a reader for each kind of call (:data:`READERS`).

``x.view(n, self.width)`` needs ``self.width`` to be the length of the result's second axis, ``x.split(self.sizes, 1)`` each entry that of a
part, ``conv(x, w, groups=self.groups)`` as many equal blocks of channels as before, less those of which nothing survives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..operations.notation import Value
from .sizes import Expr, Size, expression


@dataclass(frozen=True)
class Need:
    """What a size stands for: the length of an axis, or the survivors before / after a position, or blocks of it;
    a count of copies stays what it was."""

    kind: str
    value: Value
    dim: int
    at: int = 0


@dataclass(frozen=True)
class Call:
    """A size given to a call, and what it has to be."""

    expr: Expr
    need: Need
    op: str
    module: str
    line: str


class Asked:
    """One call of the Python code as its reader sees it: arguments, the result, and the values that the recorder knows of them."""

    __slots__ = ("args", "calls", "first", "kwargs", "module", "name", "out", "recorder", "result")

    def __init__(self, calls: list[Call], recorder: Any, name: str, args: tuple, kwargs: dict, result: Any, module: str) -> None:
        self.calls, self.recorder, self.name, self.args, self.kwargs, self.result, self.module = calls, recorder, name, args, kwargs, result, module
        self.first, self.out = self.argument(0, "input"), self.known(result)

    def argument(self, at: int, *names: str, otherwise: Any = None) -> Any:
        """The argument at a position, or under one of its names."""
        if len(self.args) > at:
            return self.args[at]
        return next((self.kwargs[name] for name in names if name in self.kwargs), otherwise)

    def known(self, tensor: Any) -> Value | None:
        return self.recorder.values.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def needs(self, given: Any, value: Value | None, kind: str, dim: int, at: int = 0) -> None:
        """A size that is given has to be what ``kind`` says of an axis."""
        if not isinstance(given, int) or isinstance(given, bool) or given == -1 or value is None:
            return
        moves = any(field.shape[dim] > 1 for field in value.fields)
        if moves or isinstance(given, Size):
            self.calls.append(Call(expression(given), Need(kind, value, dim % len(value.shape), at), self.name, self.module, self.recorder.line()))

    def copies(self, given: Any, length: int, dim: int) -> None:
        """A count of copies: the new length where one entry is copied; else it may not change."""
        if length == 1:
            self.needs(given, self.out, "size", dim)
        elif isinstance(given, Size):
            self.needs(given, self.out, "count", dim, int(given))


READERS: dict[str, Callable[[Asked], None]] = {}  # by the name of the function; "conv" of every convolution


def calls_of(calls: list[Call], recorder: Any, name: str, args: tuple, kwargs: dict, result: Any, module: str) -> None:
    """Write down the sizes of one call of the Python code, for which :func:`sized` holds."""
    READERS["conv" if name.startswith("conv") else name](Asked(calls, recorder, name, args, kwargs, result, module))


def sized(name: str) -> bool:
    """Whether the sizes given to a function are written down."""
    return name in READERS or name.startswith("conv")


def reader(*names: str) -> Callable[[Callable[[Asked], None]], Callable[[Asked], None]]:
    """Make a function the reader of calls of these names."""

    def note(function: Callable[[Asked], None]) -> Callable[[Asked], None]:
        READERS.update(dict.fromkeys(names, function))
        return function

    return note


def _ints(items: Any) -> list:
    flat = []
    for item in items:
        flat += list(item) if isinstance(item, list | tuple) else [item]
    return [i if isinstance(i, int) and not isinstance(i, bool) else None for i in flat]


# -- shapes of results -----------------------------------------------------------------------------------------------------------


def _shape(asked: Asked, sizes: list) -> None:
    if asked.out:
        for dim, given in enumerate(sizes[: len(asked.out.shape)]):
            asked.needs(given, asked.out, "size", dim)


@reader("view", "reshape", "expand", "broadcast_to")
def _view(asked: Asked) -> None:
    _shape(asked, _ints(asked.args[1:]) or _ints([asked.kwargs.get("shape", asked.kwargs.get("size", ()))]))


@reader("unflatten")
def _unflatten(asked: Asked) -> None:
    at = asked.argument(1, "dim") % asked.first.ndim
    _shape(asked, [None] * at + _ints([asked.argument(2, "sizes")]))


@reader("zeros", "ones", "empty", "randn", "rand")
def _made(asked: Asked) -> None:
    _shape(asked, _ints(asked.args) or _ints([asked.kwargs.get("size", ())]))


@reader("new_zeros", "new_ones", "new_empty")
def _made_like(asked: Asked) -> None:
    _shape(asked, _ints(asked.args[1:]) or _ints([asked.kwargs.get("size", ())]))


@reader("full")
def _full(asked: Asked) -> None:
    _shape(asked, _ints([asked.argument(0, "size", otherwise=())]))


@reader("new_full")
def _full_like(asked: Asked) -> None:
    _shape(asked, _ints([asked.argument(1, "size", otherwise=())]))


@reader("repeat", "tile")
def _repeat(asked: Asked) -> None:
    if asked.out and asked.args:
        counts = _ints(asked.args[1:] or [asked.kwargs.get("repeats", asked.kwargs.get("dims", ()))])
        for back, given in enumerate(reversed(counts), 1):
            asked.copies(given, asked.first.shape[-back] if back <= asked.first.ndim else 1, len(asked.out.shape) - back)


@reader("repeat_interleave")
def _repeat_interleave(asked: Asked) -> None:
    if asked.out:
        given, dim = asked.argument(1, "repeats"), asked.argument(2, "dim")
        asked.copies(given, asked.first.numel() if dim is None else asked.first.shape[dim], dim or 0)


# -- parts of an axis ------------------------------------------------------------------------------------------------------------


@reader("split", "split_with_sizes")
def _split(asked: Asked) -> None:
    if not isinstance(asked.result, list | tuple):
        return
    sizes = asked.argument(1, "split_size_or_sections", "split_size")
    dim = asked.argument(2, "dim", otherwise=0)
    if isinstance(sizes, int):
        for part in asked.result[:-1] or asked.result:
            asked.needs(sizes, asked.known(part), "size", dim)
        _even(asked, dim)
    else:
        for given, part in zip(sizes, asked.result, strict=False):
            asked.needs(given, asked.known(part), "size", dim)


@reader("chunk")
def _chunk(asked: Asked) -> None:
    _even(asked, asked.argument(2, "dim", otherwise=0))


def _even(asked: Asked, dim: int) -> None:
    """Equal parts must stay equal: tie them entry by entry."""
    values = [asked.known(part) for part in asked.result]
    if any(value is None for value in values):
        return
    first = values[0]
    for value in values[1:]:
        for left, right in zip(first.fields, value.fields, strict=False):
            if left.shape == right.shape and left.shape[dim] > 1:
                asked.recorder.labels.join(left, right)


@reader("__getitem__")
def _getitem(asked: Asked) -> None:
    value, index = asked.known(asked.first), asked.args[1]
    if not value:
        return
    index = index if isinstance(index, tuple) else (index,)
    dim, used = 0, sum(i is not None and i is not Ellipsis for i in index)
    for item in index:
        if item is Ellipsis:
            dim += len(value.shape) - used
            continue
        if item is None:
            continue
        if isinstance(item, slice):
            for end in (item.start, item.stop):
                if isinstance(end, int) and 0 < end < value.shape[dim]:
                    asked.needs(end, value, "before", dim, int(end))
                elif isinstance(end, Size) and end > 0:
                    asked.needs(end, value, "size", dim)
                elif isinstance(end, int) and end < 0 and type(end) is int:
                    asked.needs(-end, value, "after", dim, -int(end))
        dim += 1 if not isinstance(item, torch.Tensor) or item.dtype != torch.bool else item.ndim


@reader("narrow")
def _narrow(asked: Asked) -> None:
    dim, start, length = asked.argument(1, "dim"), asked.argument(2, "start"), asked.argument(3, "length")
    value = asked.known(asked.first)
    if value and isinstance(start, int):  # a tensor may say where it begins
        asked.needs(length, asked.out, "size", dim)
        asked.needs(start, value, "before", dim, int(start))


@reader("roll")
def _roll(asked: Asked) -> None:
    value = asked.known(asked.first)
    if value:
        for shift, dim in zip(_ints([asked.argument(1, "shifts")]), _ints([asked.argument(2, "dims", otherwise=())]), strict=False):
            if shift and shift > 0:
                asked.needs(shift, value, "after", dim, int(shift))


@reader("pad")
def _pad(asked: Asked) -> None:
    if not asked.out:
        return
    amounts = asked.argument(1, "pad")
    for index, given in enumerate(amounts):
        dim = len(asked.out.shape) - 1 - index // 2
        asked.needs(given, asked.out, "after" if index % 2 else "before", dim, int(given))
        before = amounts[index - 1]
        if index % 2 and type(given) is Size and type(before) is Size and given.expr == before.expr:
            _both_ends(asked, dim, int(given))


def _both_ends(asked: Asked, dim: int, count: int) -> None:
    """One size gives the padding on both sides: as much must stay before as after."""
    for field in asked.out.fields:
        if field.shape[dim] > 1 and field.size == field.shape[dim]:
            flat = field.ravel()
            asked.recorder.labels.join(flat[:count], flat[len(flat) - count :])


# -- blocks, norms, heads --------------------------------------------------------------------------------------------------------


@reader("group_norm")
def _group_norm(asked: Asked) -> None:
    groups = asked.argument(1, "num_groups")
    asked.needs(groups, asked.known(asked.first), "blocks", 1, int(groups))


@reader("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(asked: Asked) -> None:
    """Channels change places with those of the other groups, so each group has to keep the same ones."""
    value, groups = asked.known(asked.first), asked.argument(1, "groups")
    asked.needs(groups, value, "blocks", 1, int(groups))
    for field in value.fields if value else ():
        if field.shape[1] > 1:
            first, *others = field.swapaxes(0, 1).reshape(int(groups), -1)
            for other in others:
                asked.recorder.labels.join(first, other)


@reader("conv")
def _convolution(asked: Asked) -> None:
    value, weight, groups = asked.known(asked.first), asked.argument(1, "weight"), asked.argument(6, "groups", otherwise=1)
    if value and isinstance(groups, int) and groups > 1:
        asked.needs(groups, value, "blocks", 1 if asked.first.ndim == weight.ndim else 0, int(groups))


@reader("layer_norm")
def _layer_norm(asked: Asked) -> None:
    for back, given in enumerate(reversed(asked.argument(1, "normalized_shape"))):
        asked.needs(given, asked.known(asked.first), "size", len(asked.first.shape) - 1 - back)


@reader("scaled_dot_product_attention")
def _attention(asked: Asked) -> None:
    """Without a scale of its own it divides by the root of the width of a head: a factor, which may not change."""
    value = asked.known(asked.first)
    if value and asked.kwargs.get("scale") is None:
        asked.recorder.uses.floats.append(("dim", value, asked.first.dim() - 1))
