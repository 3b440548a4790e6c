"""Which attribute of which module stands behind a size in the code, and what it must become when axes are cut.

:func:`plant` replaces the integers of a (throw-away) model by :class:`~graphprune.tracing.sizes.Size`; ``needs.py`` writes down, for each call
that takes sizes, what every size has to agree with; :func:`solve` finds the new attributes and returns the calls that no attribute can satisfy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..operations.notation import Value
from .needs import Call, Need
from .sizes import COMPARISONS, Expr, Size, Uses, evaluate, leaves
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


def plant(modules: list[tuple[str, nn.Module]], values: Mapping[int, Value], original: nn.Module, uses: Uses) -> dict[tuple[Any, ...], int]:
    """Replace integer attributes (also inside lists, tuples, dictionaries and configuration objects) by sizes; return what they were.

    ``values`` finds the value of a tensor by its id: attributes that repeat the shape of a weight speak of that weight.
    ``modules`` are those of a copy of ``original``; objects that both share are left alone. ``uses`` is where the sizes note what is done with them.
    """
    symbols: dict[tuple[Any, ...], int] = {}
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
                        _enter(value, (name, key), 1, seen, symbols, uses)
                continue
            if known and kind is int and key in REPEATS:
                _repeat(module, key, values, uses)
            if known and key not in COUNTS and not (key in ("num_features", "num_channels") and _bare(module)):
                continue
            planted = _planted((name, key), value, symbols, uses)
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


def _planted(path: tuple[Any, ...], value: Any, symbols: dict[tuple[Any, ...], int], uses: Uses) -> Any:
    """The value with sizes for its integers."""
    kind: type = type(value)
    if kind is int and value > 1:
        symbols[path] = value
        return Size(value, ("attr", path), uses)
    if kind in (list, tuple) and 0 < len(value) < 64 and any(type(v) in (int, list, tuple) for v in value):
        return kind(_planted((*path, i), v, symbols, uses) for i, v in enumerate(value))
    if kind is dict and 0 < len(value) < 64:
        return {key: _planted((*path, key), v, symbols, uses) if type(key) is str and key[:1] != "_" else v for key, v in value.items()}
    return value


def _enter(holder: Any, path: tuple[Any, ...], depth: int, seen: set[int], symbols: dict[tuple[Any, ...], int], uses: Uses) -> None:
    """Plant sizes in a configuration object, and in those that it holds."""
    seen.add(id(holder))
    for key, item in list(holder.__dict__.items()):
        if type(item) in PLAIN - {int} or key[0] == "_":
            continue
        if type(item) in PLANTED:
            holder.__dict__[key] = _planted((*path, key), item, symbols, uses)
        elif depth and configures(item) and id(item) not in seen:
            _enter(item, (*path, key), depth - 1, seen, symbols, uses)


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


def _repeat(module: nn.Module, key: str, values: Mapping[int, Value], uses: Uses) -> None:
    weight = module._parameters.get("weight")
    weight = module._buffers.get("running_mean") if weight is None else weight
    axis = REPEATS[key]
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        axis = 1 - axis
    value = values.get(id(weight))
    if value is not None and axis < len(value.shape) and value.shape[axis] == module.__dict__[key]:
        module.__dict__[key] = Size(value.shape[axis], ("dim", value, axis), uses)


def _bare(module: nn.Module) -> bool:
    """Whether a norm holds no tensor whose shape would tell its number of channels."""
    return not any(tensor is not None and tensor.ndim for table in (module._parameters, module._buffers) for tensor in table.values())


def channels_of_bare_norms(nodes: list[Any], symbols: Mapping[tuple[Any, ...], int]) -> Iterator[Call]:
    """What the number of channels of a norm without tensors has to be: that of what it is given."""
    waiting = {path[0]: path for path in symbols if path[1:] in (("num_features",), ("num_channels",))}
    for node in nodes:
        path = waiting.get(node.module)
        if path and node.held and node.held[0].fields:
            value, count = node.held[0], symbols[waiting.pop(node.module)]
            dim = next((dim for dim in (1, 0) if dim < len(value.shape) and value.shape[dim] == count), None)
            if dim is not None:
                yield Call(("attr", path), Need("size", value, dim), path[1], node.module, node.line)


class Wrong(NamedTuple):
    """A size that no attribute makes right: what it has to be, its expression, and the call that it is given to.

    Of a factor or a branch there is neither need nor call. ``at`` (how many calls had been recorded by then) is there where the code may come to
    the right thing all the same: it has to be tried (:mod:`graphprune.tracing.rehearsal`).
    """

    need: Need | None
    expr: Expr
    call: Call | None
    at: int = -1
    where: tuple[str, int] | None = None

    @property
    def certain(self) -> bool:
        return self.call is None and self.at < 0


def solve(graph: Any, length: Callable[[Need], int]) -> tuple[dict[Any, Any], list[Wrong]]:
    """New values of attributes, and what they cannot satisfy.

    Sizes given to calls must be the cut lengths; factors must keep their value, comparisons their outcome.
    """
    symbols: dict[tuple[Any, ...], int] = graph.symbols
    new: dict[tuple[Any, ...], int] = {}

    def dims(leaf: Expr) -> int:
        if leaf[0] == "dim":
            return length(Need("size", leaf[1], leaf[2]))
        return new.get(leaf[1], symbols.get(leaf[1], 0))

    wanted = _wanted(graph, length)
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
    return {path: value for path, value in new.items() if value != symbols[path]}, _unmet(graph, wanted, dims)


def _wanted(graph: Any, length: Callable[[Need], int]) -> list[tuple[Expr, int, Call]]:
    """The sizes that calls are given, and those of attributes that are compared with a length: what they have to be, and for which call."""
    wanted = [(call.expr, length(call.need), call) for call in graph.calls]
    for left, right in graph.equals:
        for attribute, dim in ((left, right), (right, left)):
            if attribute[0] == "attr" and dim[0] == "dim":
                need = Need("size", dim[1], dim[2])
                wanted.append((attribute, length(need), Call(attribute, need, "==", "", "")))
    return wanted


def _unmet(graph: Any, wanted: list[tuple[Expr, int, Call]], dims: Callable[[Expr], int]) -> list[Wrong]:
    """What is not as it has to be where sizes are what ``dims`` says."""
    old = _old(graph.symbols)
    wrong = [Wrong(call.need, expr, call) for expr, value, call in wanted if evaluate(expr, dims) != value]
    wrong += [Wrong(None, expr, None) for expr in graph.floats if evaluate(expr, dims) != evaluate(expr, old)]
    wrong += [Wrong(None, expr, None, at, where) for expr, at, where in graph.doubts if evaluate(expr, dims) != evaluate(expr, old)]
    for symbol, left, right, outcome, at, where in graph.outcomes:
        if COMPARISONS[symbol](evaluate(left, dims), evaluate(right, dims)) != outcome:
            wrong.append(Wrong(None, ("-", left, right), None, at, where))
    return wrong


def _attrs(expr: Expr) -> list[Any]:
    return [leaf for leaf in leaves(expr) if leaf[0] == "attr"]


def _old(symbols: dict[Any, Any]) -> Callable[..., Any]:
    return lambda leaf: leaf[1].shape[leaf[2]] if leaf[0] == "dim" else symbols[leaf[1]]
