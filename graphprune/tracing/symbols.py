"""Which attribute of which module stands behind a size in the code, and what it must become when axes are cut.

:func:`plant` replaces the integers of a (throw-away) model by :class:`~graphprune.sizes.Size`; :func:`calls_of` writes
down, for each call that takes sizes, what every size has to agree with; :func:`solve` finds the new attributes and
returns the calls that no attribute can satisfy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .notation import Value
from .sizes import COMPARISONS, Expr, Size, evaluate, expression, leaves
from .trees import PLAIN, modules_of

# Modules whose attributes follow from the shapes of their own weights (see apply.py).
SHAPED = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.Embedding, nn.GroupNorm)
SHAPED += (nn.RMSNorm, nn.PReLU)
PLANTED = frozenset((int, list, tuple, dict))
NEITHER = PLAIN - PLANTED
_CONFIGURES: WeakKeyDictionary[type, bool] = WeakKeyDictionary()  # a rewritten module is of a class of its own
# … and which axis of their weight such an attribute repeats.
REPEATS = {"out_features": 0, "in_features": 1, "out_channels": 0, "in_channels": 1, "num_features": 0, "num_channels": 0}
REPEATS |= {"embedding_dim": 1, "num_embeddings": 0, "num_parameters": 0}
COUNTS = ("groups", "num_groups", "normalized_shape")
# The functions whose sizes are written down (and every convolution).
SIZED = frozenset(
    "view reshape expand unflatten broadcast_to zeros ones full empty randn rand new_zeros new_ones new_full new_empty split "
    "split_with_sizes chunk __getitem__ narrow group_norm layer_norm roll pad "
    "repeat repeat_interleave tile channel_shuffle native_channel_shuffle scaled_dot_product_attention".split()
)


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


def plant(modules: list[tuple[str, nn.Module]], values: Mapping[int, Value], original: nn.Module) -> dict[tuple, int]:
    """Replace integer attributes (also inside lists, tuples, dictionaries and configuration objects) by sizes; return what they were.

    ``values`` finds the value of a tensor by its id: attributes that repeat the shape of a weight speak of that weight.
    ``modules`` are those of a copy of ``original``; objects that both share are left alone.
    """
    symbols: dict[tuple, int] = {}
    seen: set[int] = set()
    entered = False
    for name, module in modules:
        known = _shaped(type(module))
        for key, value in list(module.__dict__.items()):
            kind = type(value)
            if kind in NEITHER or key[0] == "_":
                continue
            if kind not in PLANTED:
                if configures(value):
                    if not entered:
                        seen.update(_own(original))
                    entered = True
                    if id(value) not in seen:
                        _enter(value, (name, key), 1, seen, symbols)
                continue
            if known and kind is int and key in REPEATS:
                _repeat(module, key, values)
            if known and key not in COUNTS:
                continue
            planted = _planted((name, key), value, symbols)
            if planted is not value:
                module.__dict__[key] = planted
    return symbols


def _own(model: nn.Module) -> Iterator[int]:
    """The ids of what the modules of a model hold, and of what their configuration objects hold: some copy as themselves."""
    for _, module in modules_of(model):
        for item in module.__dict__.values():
            yield id(item)
            if type(item) not in PLAIN and configures(item):
                yield from map(id, item.__dict__.values())


def _planted(path: tuple, value: Any, symbols: dict[tuple, int]) -> Any:
    """The value with sizes for its integers."""
    if type(value) is int and value > 1:
        symbols[path] = value
        return Size(value, ("attr", path))
    if type(value) in (list, tuple) and 0 < len(value) < 64 and any(type(v) in (int, list, tuple) for v in value):
        return type(value)(_planted((*path, i), v, symbols) for i, v in enumerate(value))
    if type(value) is dict and 0 < len(value) < 64:
        return {key: _planted((*path, key), v, symbols) if type(key) is str and key[:1] != "_" else v for key, v in value.items()}
    return value


def _enter(holder: Any, path: tuple, depth: int, seen: set[int], symbols: dict[tuple, int]) -> None:
    """Plant sizes in a configuration object, and in those that it holds."""
    seen.add(id(holder))
    for key, item in list(holder.__dict__.items()):
        if type(item) in PLAIN - {int} or key[0] == "_":
            continue
        if type(item) in PLANTED:
            holder.__dict__[key] = _planted((*path, key), item, symbols)
        elif depth and configures(item) and id(item) not in seen:
            _enter(item, (*path, key), depth - 1, seen, symbols)


def _shaped(kind: type) -> bool:
    """Whether it is one of torch's own modules whose attributes repeat the shapes of their weights."""
    return kind.__module__.startswith("torch.nn.") and issubclass(kind, SHAPED)


def configures(value: Any) -> bool:
    """Whether an object may hold sizes: an instance of an ordinary class with attributes, neither torch's nor built in.

    >>> from types import SimpleNamespace
    >>> configures(SimpleNamespace(heads=4)), configures(nn.ReLU()), configures([4])
    (True, False, False)
    """
    kind = type(value)
    if kind not in _CONFIGURES:
        other = issubclass(kind, nn.Module | torch.Tensor | type | Enum | Mapping | list | tuple | set | int | str | ModuleType) or callable(value)
        foreign = kind.__module__.partition(".")[0] in ("torch", "builtins", "functools", "collections", "numpy")
        _CONFIGURES[kind] = kind.__dictoffset__ != 0 and not other and not foreign
    return _CONFIGURES[kind]


def _repeat(module: nn.Module, key: str, values: Mapping[int, Value]) -> None:
    weight = module._parameters.get("weight")
    weight = module._buffers.get("running_mean") if weight is None else weight
    axis = REPEATS[key]
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        axis = 1 - axis
    found = values.get(id(weight))
    if found is not None and axis < len(found.shape) and found.shape[axis] == module.__dict__[key]:
        module.__dict__[key] = Size(found.shape[axis], ("dim", found, axis))


def _ints(items: Any) -> list:
    flat = []
    for item in items:
        flat += list(item) if isinstance(item, list | tuple) else [item]
    return [i if isinstance(i, int) and not isinstance(i, bool) else None for i in flat]


def calls_of(calls: list[Call], recorder: Any, name: str, args: tuple, kwargs: dict, result: Any, module: str) -> None:
    """Write down the sizes of one call of the Python code."""

    def known(tensor: Any) -> Value | None:
        return recorder.values.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None

    def add(given: Any, value: Value | None, kind: str, dim: int, at: int = 0) -> None:
        if not isinstance(given, int) or isinstance(given, bool) or given == -1 or value is None:
            return
        moves = any(f.shape[dim] > 1 for f in value.fields)
        if moves or isinstance(given, Size):
            calls.append(Call(expression(given), Need(kind, value, dim % len(value.shape), at), name, module, recorder.line()))

    def copied(given: Any, length: int, dim: int) -> None:
        """A count of copies: the new length where one entry is copied; else it may not change."""
        if length == 1:
            add(given, out, "size", dim)
        elif isinstance(given, Size):
            add(given, out, "count", dim, int(given))

    out = known(result)
    if name in ("view", "reshape", "expand", "unflatten", "broadcast_to") and out:
        sizes = _ints(args[1:]) if name != "unflatten" else _ints([args[2] if len(args) > 2 else kwargs["sizes"]])
        if name == "unflatten":
            at = (args[1] if len(args) > 1 else kwargs["dim"]) % args[0].ndim
            sizes = [None] * at + sizes
        elif not sizes:
            sizes = _ints([kwargs.get("shape", kwargs.get("size", ()))])
        for dim, given in enumerate(sizes):
            if dim < len(out.shape):
                add(given, out, "size", dim)
    elif name in ("zeros", "ones", "full", "empty", "randn", "rand", "new_zeros", "new_ones", "new_full", "new_empty") and out:
        start = 1 if name.startswith("new_") else 0
        given = args[start:] if name not in ("full", "new_full") else args[start : start + 1]
        for dim, item in enumerate(_ints(given) or _ints([kwargs.get("size", ())])):
            if dim < len(out.shape):
                add(item, out, "size", dim)
    elif name in ("split", "split_with_sizes") and isinstance(result, list | tuple):
        sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        if isinstance(sizes, int):
            for part in result[:-1] or result:
                add(sizes, known(part), "size", dim)
            _even(recorder, result, dim)
        else:
            for given, part in zip(sizes, result, strict=False):
                add(given, known(part), "size", dim)
    elif name == "chunk":
        _even(recorder, result, args[2] if len(args) > 2 else kwargs.get("dim", 0))
    elif name == "__getitem__" and known(args[0]):
        _getitem(add, known(args[0]), args[1])
    elif name == "narrow" and known(args[0]):
        add(args[3], out, "size", args[1])
        add(args[2], known(args[0]), "before", args[1], int(args[2]))
    elif name in ("repeat", "tile") and out and args:
        counts = _ints(args[1:] or [kwargs.get("repeats", kwargs.get("dims", ()))])
        for back, given in enumerate(reversed(counts), 1):
            copied(given, args[0].shape[-back] if back <= args[0].ndim else 1, len(out.shape) - back)
    elif name == "repeat_interleave" and out and args:
        given, dim = (args[at] if len(args) > at else kwargs.get(key) for at, key in ((1, "repeats"), (2, "dim")))
        copied(given, args[0].numel() if dim is None else args[0].shape[dim], dim or 0)
    elif name == "group_norm":
        add(args[1], known(args[0]), "blocks", 1, int(args[1]))
    elif name.startswith("conv") and known(args[0]):
        groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        if isinstance(groups, int) and groups > 1:
            add(groups, known(args[0]), "blocks", 1 if args[0].ndim == args[1].ndim else 0, int(groups))
    elif name == "layer_norm":
        for back, given in enumerate(reversed(args[1] if len(args) > 1 else kwargs["normalized_shape"])):
            add(given, known(args[0]), "size", len(args[0].shape) - 1 - back)
    elif name == "roll" and known(args[0]) and len(args) > 2:
        for shift, dim in zip(_ints([args[1]]), _ints([args[2]]), strict=False):
            if shift and shift > 0:
                add(shift, known(args[0]), "after", dim, int(shift))
    elif name == "pad" and out and len(args) > 1:
        for index, given in enumerate(args[1]):
            dim = len(out.shape) - 1 - index // 2
            add(given, out, "after" if index % 2 else "before", dim, int(given))
            before = args[1][index - 1]
            if index % 2 and type(given) is Size and type(before) is Size and given.expr == before.expr:
                _both_ends(recorder, out, dim, int(given))
    elif name in ("channel_shuffle", "native_channel_shuffle"):
        groups = args[1] if len(args) > 1 else kwargs["groups"]
        add(groups, known(args[0]), "blocks", 1, int(groups))
    elif name == "scaled_dot_product_attention" and kwargs.get("scale") is None and known(args[0]):
        Size.floats.append(("dim", known(args[0]), args[0].dim() - 1))


def _even(recorder: Any, parts: Any, dim: int) -> None:
    """Equal parts must stay equal: tie them entry by entry."""
    values = [recorder.values.get(id(part)) for part in parts]
    if any(value is None for value in values):
        return
    first = values[0]
    for value in values[1:]:
        for left, right in zip(first.fields, value.fields, strict=False):
            if left.shape == right.shape and left.shape[dim] > 1:
                recorder.labels.join(left, right)


def _both_ends(recorder: Any, value: Value, dim: int, count: int) -> None:
    """One size gives the padding on both sides: as much must stay before as after."""
    for field in value.fields:
        if field.shape[dim] > 1 and field.size == field.shape[dim]:
            flat = field.ravel()
            recorder.labels.join(flat[:count], flat[len(flat) - count :])


def _getitem(add: Callable, value: Value, index: Any) -> None:
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
                    add(end, value, "before", dim, int(end))
                elif isinstance(end, Size) and end > 0:
                    add(end, value, "size", dim)
                elif isinstance(end, int) and end < 0 and type(end) is int:
                    add(-end, value, "after", dim, -int(end))
        dim += 1 if not isinstance(item, torch.Tensor) or item.dtype != torch.bool else item.ndim


def solve(graph: Any, length: Callable[[Need], int]) -> tuple[dict, list]:
    """New values of attributes, and the (need, expression, call) of what they cannot satisfy.

    Sizes given to calls must be the cut lengths, factors must keep their value, and comparisons their outcome.
    """
    symbols: dict[tuple, int] = graph.symbols
    new: dict[tuple, int] = {}

    def dims(leaf: Expr) -> int:
        if leaf[0] == "dim":
            return length(Need("size", leaf[1], leaf[2]))
        return new.get(leaf[1], symbols.get(leaf[1], 0))

    wanted = [(call.expr, length(call.need), call) for call in graph.calls]
    for left, right in graph.equals:
        for mine, other in ((left, right), (right, left)):
            if mine[0] == "attr" and other[0] == "dim":
                need = Need("size", other[1], other[2])
                wanted.append((mine, length(need), Call(mine, need, "==", "", "")))
    for expr, value, _ in wanted:
        if not isinstance(expr, int) and expr[0] == "attr":
            new.setdefault(expr[1], value)
    for expr, value, _ in wanted:
        unknown = [leaf for leaf in set(_attrs(expr)) if leaf[1] not in new]
        if len(unknown) != 1 or evaluate(expr, dims) == value:
            continue
        path = unknown[0][1]
        for guess in range(symbols[path], 0, -1):
            new[path] = guess
            if evaluate(expr, dims) == value:
                break
        else:
            del new[path]
    wrong = [(call.need, expr, call) for expr, value, call in wanted if evaluate(expr, dims) != value]
    frozen = [expr for expr in graph.floats if evaluate(expr, dims) != evaluate(expr, _old(symbols))]
    for symbol, left, right, outcome in graph.outcomes:
        if COMPARISONS[symbol](evaluate(left, dims), evaluate(right, dims)) != outcome:
            frozen.append(("-", left, right))
    return {path: value for path, value in new.items() if value != symbols[path]}, wrong + [(None, e, None) for e in frozen]


def _attrs(expr: Expr) -> list:
    return [leaf for leaf in leaves(expr) if leaf[0] == "attr"]


def _old(symbols: dict) -> Callable:
    return lambda leaf: leaf[1].shape[leaf[2]] if leaf[0] == "dim" else symbols[leaf[1]]
