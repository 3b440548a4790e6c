"""What the sizes given to a call have to be: :func:`calls_of` writes them down, with a reader for each kind of call (:data:`READERS`).

``x.view(n, self.width)`` needs ``self.width`` to be the length of the result's second axis, ``x.split(self.sizes, 1)`` each entry that of a
part, ``conv(x, w, groups=self.groups)`` as many equal blocks of channels as before, less those of which nothing survives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..operations.labels import Reason
from ..operations.notation import Value
from .choices import counts_up
from .sizes import Expr, Size, expression, leaves, number


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
    since: int = 0  # how many ATen calls had been recorded before it, and after, in all runs
    until: int = 0


class Asked:
    """One call of the Python code as its reader sees it: arguments, the result, and the values that the recorder knows of them."""

    __slots__ = ("args", "calls", "first", "kwargs", "module", "name", "out", "recorder", "result", "since", "understood")

    def __init__(
        self, calls: list[Call], recorder: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, module: str, since: int
    ) -> None:
        self.calls, self.recorder, self.name, self.args, self.kwargs, self.result, self.module = calls, recorder, name, args, kwargs, result, module
        self.first, self.out, self.since = self.argument(0, "input"), self.known(result), since
        self.understood: set[int] = set()  # the ids of sizes of which it is known what they stand for

    def argument(self, at: int, *names: str, otherwise: Any = None) -> Any:
        """The argument at a position, or under one of its names."""
        if len(self.args) > at:
            return self.args[at]
        return next((self.kwargs[name] for name in names if name in self.kwargs), otherwise)

    def known(self, tensor: Any) -> Value | None:
        return self.recorder.values.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def needs(self, size: Any, value: Value | None, kind: str, dim: int, at: int = 0) -> None:
        """A size that is given has to be what ``kind`` says of an axis."""
        self.understood.add(id(size))
        if not isinstance(size, int) or isinstance(size, bool) or size == -1 or value is None:
            return
        moves = any(field.shape[dim] > 1 for field in value.fields)
        if moves or isinstance(size, Size):
            need, until = Need(kind, value, dim % len(value.shape), at), self.recorder.counted
            self.calls.append(Call(expression(size), need, self.name, self.module, self.recorder.line(), self.since, until))

    def whole(self, value: Value | None, dim: int, text: str) -> None:
        """Leave an axis whole: no cut of it would mean the same to this call."""
        moving = [field for field in value.fields if field.shape[dim] > 1] if value else []
        if moving:
            reason = self.recorder.labels.reason(Reason(text, self.name, self.module, self.recorder.here()))
            for field in moving:
                self.recorder.labels.lock(field, reason)

    def joined(self, value: Value | None, dim: int, start: int, count: int, stride: int) -> None:
        """Tie the ``count`` entries of an axis that lie ``stride`` apart, block after block, from ``start`` on."""
        for field in value.fields if value else ():
            if field.shape[dim] > 1:
                lead = np.moveaxis(field, dim, 0)
                for base in range(start, len(lead), count * stride):
                    block = lead[base : base + count * stride]
                    for step in range(1, count):
                        other = block[step * stride : (step + 1) * stride]
                        if len(other):
                            self.recorder.labels.join(block[: len(other)], other)

    def copies(self, size: Any, length: int, dim: int) -> None:
        """A count of copies: the new length where one entry is copied; else it may not change."""
        if length == 1:
            self.needs(size, self.out, "size", dim)
            if isinstance(size, Size) and self.out and size.expr[0] == "dim":
                _, source, along = size.expr
                self.as_many(self.out, dim, source, along)
        elif isinstance(size, Size) and self.recorder.labels.apart:
            self.understood.add(id(size))
            self.needs(size * length, self.out, "size", dim)
        elif isinstance(size, Size):
            self.needs(size, self.out, "count", dim, number(size))

    def as_many(self, copies: Value, dim: int, source: Value, along: int) -> None:
        """As many copies as an axis has entries go with those entries."""
        if source.shape[along] != copies.shape[dim]:
            return
        for field in copies.fields:
            for axis in source.fields:
                if field.shape[dim] == field.size and axis.shape[along] == axis.size:
                    self.recorder.labels.join(field.ravel(), axis.ravel())


READERS: dict[str, Callable[[Asked], None]] = {}  # by the name of the function; "conv" of every convolution


def calls_of(calls: list[Call], recorder: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, module: str, since: int) -> None:
    """Write down the sizes of one call of the Python code, for which :func:`sized` holds. Those at other places in it are factors."""
    uses = recorder.uses
    marks = len(uses.outcomes), len(uses.doubts)
    asked = Asked(calls, recorder, name, args, kwargs, result, module, since)
    READERS["conv" if name.startswith("conv") else name](asked)
    del uses.outcomes[marks[0] :], uses.doubts[marks[1] :]  # what was compared here is no branch of the model
    uses.floats.extend([size.expr for size in sizes_in(args, kwargs) if id(size) not in asked.understood])


def sizes_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Size]:
    """The sizes among the arguments of a call, also in lists and slices."""
    sizes: list[Size] = []
    _gather(args, sizes)
    if kwargs:
        _gather(kwargs.values(), sizes)
    return sizes


def _gather(items: Any, sizes: list[Size]) -> None:
    for item in items:
        kind = type(item)
        if kind is Size:
            sizes.append(item)
        elif kind is tuple or kind is list or kind is torch.Size:
            _gather(item, sizes)
        elif kind is slice:
            _gather((item.start, item.stop, item.step), sizes)


def sized(name: str) -> bool:
    """Whether the sizes given to a function are written down."""
    return name in READERS or name.startswith("conv")


def reader(*names: str) -> Callable[[Callable[[Asked], None]], Callable[[Asked], None]]:
    """Make a function the reader of calls of these names."""

    def note(function: Callable[[Asked], None]) -> Callable[[Asked], None]:
        READERS.update(dict.fromkeys(names, function))
        return function

    return note


def _ints(items: Any) -> list[Any]:
    flat = []
    for item in items:
        flat += list(item) if isinstance(item, list | tuple) else [item]
    return [i if isinstance(i, int) and not isinstance(i, bool) else None for i in flat]


# -- shapes of results -----------------------------------------------------------------------------------------------------------


def _shape(asked: Asked, sizes: list[Any]) -> None:
    if asked.out:
        for dim, size in enumerate(sizes[: len(asked.out.shape)]):
            asked.needs(size, asked.out, "size", dim)


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


@reader("one_hot")
def _one_hot(asked: Asked) -> None:
    asked.needs(asked.argument(1, "num_classes"), asked.out, "size", -1)


@reader("arange")
def _arange(asked: Asked) -> None:
    """A size that is counted to is a factor, unless positions that were chosen are compared with the numbers (:func:`_equal`)."""
    numbers = counts_up(asked.recorder, asked.out)[1] if asked.out and len(asked.args) == 1 and isinstance(asked.args[0], Size) else None
    if numbers is not None:
        asked.recorder.counted_to[id(numbers)] = asked.args[0]


@reader("__eq__", "eq")
def _equal(asked: Asked) -> None:
    other = asked.known(asked.argument(1, "other"))
    along, numbers = counts_up(asked.recorder, other) if other and asked.out and asked.recorder.counted_to else (0, None)
    size = asked.recorder.counted_to.get(id(numbers))
    if size is not None and asked.out and any(field.shape[along] > 1 for field in asked.out.fields if field.ndim >= -along):
        asked.needs(size, asked.out, "size", along)
        if size.expr in asked.recorder.uses.floats:
            asked.recorder.uses.floats.remove(size.expr)


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
        for back, count in enumerate(reversed(counts), 1):
            asked.copies(count, asked.first.shape[-back] if back <= asked.first.ndim else 1, len(asked.out.shape) - back)


@reader("repeat_interleave")
def _repeat_interleave(asked: Asked) -> None:
    if asked.out:
        count, dim = asked.argument(1, "repeats"), asked.argument(2, "dim")
        asked.copies(count, asked.first.numel() if dim is None else asked.first.shape[dim], dim or 0)


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
        along = _tied(asked, dim)
        if along is not None:
            asked.needs(-(-along // sizes), asked.known(asked.result[0]), "count", dim, len(asked.result))
    else:
        for size, part in zip(sizes, asked.result, strict=False):
            asked.needs(size, asked.known(part), "size", dim)


@reader("chunk")
def _chunk(asked: Asked) -> None:
    count, dim = asked.argument(1, "chunks"), asked.argument(2, "dim", otherwise=0)
    along = _tied(asked, dim)
    if along is not None:
        size = -(-along // count)
        for part in asked.result[:-1]:
            asked.needs(size, asked.known(part), "size", dim)
        asked.needs(-(-along // size), asked.known(asked.result[0]), "count", dim, len(asked.result))


def _tied(asked: Asked, dim: int) -> Size | None:
    """Tie parts of the same length entry by entry; returns the length of what is taken apart where there are parts of others.

    Parts that are all alike stay so. Of others every call says how long they are, which is to be true of what is left of them.
    """
    whole, parts = asked.known(asked.first), [asked.known(part) for part in asked.result]
    values = [value for value in parts if value is not None]
    if whole is None or not values or len(values) < len(parts):
        return None
    firsts: dict[int, Value] = {}
    for value in values:
        first = firsts.setdefault(value.shape[dim], value)
        for left, right in zip(first.fields, value.fields, strict=False):
            if left is not right and left.shape == right.shape and left.shape[dim] > 1:
                asked.recorder.labels.join(left, right)
    dim %= len(whole.shape)
    return Size(whole.shape[dim], ("dim", whole, dim), asked.recorder.uses) if len(firsts) > 1 else None


@reader("tensor_split", "hsplit", "vsplit", "dsplit")
def _tensor_split(asked: Asked) -> None:
    rank = asked.first.ndim
    fixed = {"hsplit": 1 if rank > 1 else 0, "vsplit": 0, "dsplit": 2}
    dim = fixed.get(asked.name, 0 if asked.name != "tensor_split" else asked.argument(2, "dim", otherwise=0))
    where = asked.argument(1, "indices_or_sections", "sections", "indices", "tensor_indices_or_sections", "split_size_or_sections")
    value = asked.known(asked.first)
    if isinstance(where, int):
        along = _tied(asked, dim)
        if along is None:
            return
        for index, part in enumerate(asked.result):
            asked.needs((along + where - 1 - index) // where, asked.known(part), "size", dim)
    elif isinstance(where, list | tuple):
        for end in where:
            _end(asked, value, dim, end)
    else:
        asked.whole(value, dim, "where it is taken apart is a value")


@reader("__getitem__", "__setitem__")
def _getitem(asked: Asked) -> None:
    value, index = asked.known(asked.first), asked.args[1]
    if not value:
        return
    index = index if isinstance(index, tuple) else (index,)
    dim, used = 0, sum(_spans(item) for item in index)
    for item in index:
        if item is Ellipsis:
            dim += len(value.shape) - used
            continue
        if isinstance(item, slice):
            step = item.step if isinstance(item.step, int) else 1
            if step > 1:
                _phases(asked, value, dim, item, number(step))
            else:
                _end(asked, value, dim, item.start)
            _end(asked, value, dim, item.stop)
        dim += _spans(item)


def _spans(item: Any) -> int:
    """How many axes one entry of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, torch.Tensor) and item.dtype == torch.bool else 1


def _end(asked: Asked, value: Value | None, dim: int, end: Any) -> None:
    """One end of a slice: as many have to survive before it, or from it to the last."""
    if value is None or not isinstance(end, int):
        return
    size, at = value.shape[dim], number(end)
    if at == 1 and all(asked.recorder.labels.is_repeated(field) for field in value.fields if field.shape[dim] > 1):
        asked.understood.add(id(end))  # one copy is like any other
    elif 0 < at < size:
        asked.needs(end, value, "before", dim, at)
    elif at == size and isinstance(end, Size):
        asked.needs(end, value, "size", dim)
    elif -size < at < 0:
        asked.understood.add(id(end))
        asked.needs(-end, value, "after", dim, -at)
    else:
        asked.understood.add(id(end))


def _phases(asked: Asked, value: Value, dim: int, item: slice, step: int) -> None:
    """Every ``step``-th entry from the start on: entries that lie between two of them stay or go together."""
    size = value.shape[dim]
    start = number(item.start) if isinstance(item.start, int) else 0
    if start < 0 or start >= size:
        asked.whole(value, dim, "every so many entries are taken, counted from its end")
        return
    if start >= step:
        _end(asked, value, dim, item.start)
    asked.joined(value, dim, start if start >= step else 0, step, 1)


@reader("narrow")
def _narrow(asked: Asked) -> None:
    dim, start, length = asked.argument(1, "dim"), asked.argument(2, "start"), asked.argument(3, "length")
    value = asked.known(asked.first)
    if value and isinstance(start, int):  # a tensor may say where it begins
        asked.needs(length, asked.out, "size", dim)
        if number(start):
            _end(asked, value, dim, start)


@reader("roll")
def _roll(asked: Asked) -> None:
    value = asked.known(asked.first)
    if value:
        for shift, dim in zip(_ints([asked.argument(1, "shifts")]), _ints([asked.argument(2, "dims", otherwise=())]), strict=False):
            if shift is None or abs(shift) >= value.shape[dim]:
                asked.whole(value, dim, "it is rolled all the way round")
            elif shift:
                asked.understood.add(id(shift))
                asked.needs(abs(shift), value, "after" if shift > 0 else "before", dim, number(abs(shift)))


@reader("pad")
def _pad(asked: Asked) -> None:
    if not asked.out:
        return
    amounts = asked.argument(1, "pad")
    for index, size in enumerate(amounts):
        dim = len(asked.out.shape) - 1 - index // 2
        side = "after" if index % 2 else "before"
        if isinstance(size, int) and size < 0:  # so many are taken off
            asked.understood.add(id(size))
            asked.needs(-size, asked.known(asked.first), side, dim, number(-size))
            continue
        asked.needs(size, asked.out, side, dim, number(size))
        before = amounts[index - 1]
        if index % 2 and type(size) is Size and type(before) is Size and size.expr == before.expr:
            _both_ends(asked, asked.out, dim, number(size))


def _both_ends(asked: Asked, padded: Value, dim: int, count: int) -> None:
    """One size gives the padding on both sides: as much must stay before as after."""
    for field in padded.fields:
        if field.shape[dim] > 1 and field.size == field.shape[dim]:
            flat = field.ravel()
            asked.recorder.labels.join(flat[:count], flat[len(flat) - count :])


# -- blocks, norms, heads --------------------------------------------------------------------------------------------------------


@reader("group_norm")
def _group_norm(asked: Asked) -> None:
    groups = asked.argument(1, "num_groups")
    asked.needs(groups, asked.known(asked.first), "blocks", 1, number(groups))


@reader("affine_grid", "affine_grid_generator")
def _affine_grid(asked: Asked) -> None:
    """Places in an image of some shape, which its number of channels says nothing about."""
    asked.understood.update(id(size) for size in list(asked.argument(1, "size", otherwise=()))[:2])


@reader("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(asked: Asked) -> None:
    """Channels change places with those of the other groups, so each group has to keep the same ones."""
    value, groups = asked.known(asked.first), asked.argument(1, "groups")
    asked.needs(groups, value, "blocks", 1, number(groups))
    for field in value.fields if value else ():
        if field.shape[1] > 1:
            first, *others = field.swapaxes(0, 1).reshape(number(groups), -1)
            for other in others:
                asked.recorder.labels.join(first, other)


@reader("conv")
def _convolution(asked: Asked) -> None:
    value, weight, groups = asked.known(asked.first), asked.argument(1, "weight"), asked.argument(6, "groups", otherwise=1)
    if value and isinstance(groups, int) and groups > 1:
        asked.needs(groups, value, "blocks", 1 if asked.first.ndim == weight.ndim else 0, number(groups))


@reader("layer_norm", "rms_norm")
def _layer_norm(asked: Asked) -> None:
    for back, size in enumerate(reversed(asked.argument(1, "normalized_shape"))):
        asked.needs(size, asked.known(asked.first), "size", len(asked.first.shape) - 1 - back)


@reader("scaled_dot_product_attention")
def _attention(asked: Asked) -> None:
    """Without a scale of its own it divides by the root of the width of a head: a factor, which may not change."""
    value = asked.known(asked.first)
    if value and asked.kwargs.get("scale") is None:
        asked.recorder.uses.floats.append(("dim", value, asked.first.dim() - 1))
    if asked.kwargs.get("enable_gqa"):
        _copies_inside(asked)


def _copies_inside(asked: Asked) -> None:
    """A kernel that repeats keys itself is told no number of copies; one that the module compared on the way here, and that is the same, is that number."""
    recorder = asked.recorder
    nodes = recorder.nodes[asked.since - recorder.earlier :]
    every = [(value, dim) for node in nodes if node.op.copies for value in node.outs for dim in _repeated(recorder.labels, value)]
    compared = {leaf for branch in recorder.uses.outcomes for expr in branch[1:3] for leaf in leaves(expr) if leaf[0] == "attr" and leaf[1][0] == asked.module}
    for leaf in sorted(compared, key=str):
        for value, dim in every:
            if recorder.symbols.get(leaf[1]) == value.shape[dim]:
                asked.calls.append(Call(leaf, Need("size", value, dim), asked.name, asked.module, recorder.line(), asked.since, recorder.counted))


def _repeated(labels: Any, value: Value) -> list[int]:
    """The axes of a tensor along which something is repeated."""
    return [dim for field in value.fields for dim, size in enumerate(field.shape) if size > 1 and size == field.size and labels.is_repeated(field)]


@reader("bincount")
def _tally(asked: Asked) -> None:
    asked.needs(asked.argument(2, "minlength"), asked.out, "size", 0)


@reader("histc")
def _bins(asked: Asked) -> None:
    """As many bins as what is counted has numbers, the last of them being one less."""
    bins, top = asked.argument(1, "bins"), asked.argument(3, "max")
    asked.needs(bins, asked.out, "size", 0)
    if type(top) is Size and number(top) == number(bins) - 1:
        asked.understood.add(id(top))
        asked.needs(top + 1, asked.out, "size", 0)
