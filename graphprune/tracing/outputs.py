"""What a model returns: :func:`items` finds the tensors and numbers in any result, :func:`selected` those that the user asks for.

Containers, mappings, dataclasses, views, iterators (which are used up), plain objects and what functions close over are looked into. A result in which
something stands that cannot be looked into is refused: nobody could say whether the cut model still returns it.

>>> from types import SimpleNamespace
>>> [path for path, _ in items({"a": [torch.zeros(2), 3], "b": SimpleNamespace(c=torch.ones(1))})]
['a.0', 'a.1', 'b.c']
>>> [path for path, _ in selected(items({"logits": torch.zeros(2), "states": (torch.ones(1),)}), "logits")]
['logits']
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from fractions import Fraction
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, MethodWrapperType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import BadInput, UnknownName

Item = tuple[str, Any]  # the path to it, and a tensor, an array or a number
Selection = Any  # a name, an index, a predicate (path, tensor) -> bool, a sequence of these, or None
NUMBERS = (int, float, complex, Fraction, np.generic)
SILENT = (str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, range, slice, Enum)
SILENT += (type, ModuleType, nn.Module, weakref.ref)
BOUND = (BuiltinFunctionType, MethodType, MethodWrapperType)
MANY = 100_000  # entries of one result
OUTPUT = "an output of the model keeps its size"  # why entries of outputs stay


def items(result: Any) -> list[Item]:
    """Every tensor, array and number that a result holds, with its path, in order.

    Raises :class:`~graphprune.errors.BadInput` for what cannot be looked into, or is endless.
    """
    collected: list[Item] = []
    _walk(result, "", True, set(), collected)
    return collected


def _walk(tree: Any, path: str, plain: bool, seen: set[int], collected: list[Item]) -> None:
    """``plain``: whether the way here leads through containers alone; numbers in other objects are settings as often as results."""
    if isinstance(tree, torch.Tensor | np.ndarray):
        collected.append((path, tree))
        return
    if isinstance(tree, SILENT):
        return
    if isinstance(tree, NUMBERS):
        if plain:
            collected.append((path, tree))
        return
    if id(tree) in seen:
        return
    seen = {*seen, id(tree)}
    parts = _parts(tree)
    if parts is None:
        kind = f"{type(tree).__module__}.{type(tree).__qualname__}"
        raise BadInput(f"the model returns a {kind}{f' (at {path})' if path else ''}, in which its outputs cannot be found; return tensors, or wrap the model")
    inside = plain and isinstance(tree, Iterable)
    for key, part in parts:
        if len(collected) > MANY:
            raise BadInput(f"the model returns more than {MANY} entries{f' (at {path})' if path else ''}; return tensors, or wrap the model")
        _walk(part, f"{path}.{key}" if path else str(key), inside, seen, collected)


def _parts(tree: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(tree, Mapping):
        return tree.items()
    names = getattr(tree, "_fields", None)
    if isinstance(tree, tuple) and names is not None:
        return zip(names, tree, strict=True)
    if isinstance(tree, list | tuple | set | frozenset | Iterator):
        return enumerate(tree)
    if is_dataclass(tree):
        return [(entry.name, getattr(tree, entry.name, None)) for entry in fields(tree)]
    if isinstance(tree, (functools.partial, FunctionType, *BOUND)):
        return _enclosed(tree)
    if isinstance(tree, BaseException):
        return [*enumerate(tree.args), *_attributes(tree)]
    if getattr(tree, "__dict__", None) or any(getattr(base, "__slots__", ()) for base in type(tree).__mro__):
        return _attributes(tree)
    return enumerate(tree) if isinstance(tree, Iterable) else [] if type(tree).__dictoffset__ else None


def _enclosed(function: Any) -> list[tuple[Any, Any]]:
    """What a function brings along: arguments that it was given beforehand, the object that it is bound to, variables around it."""
    if isinstance(function, functools.partial):
        return [("func", function.func), *enumerate(function.args), *function.keywords.items()]
    if isinstance(function, BOUND):
        return [("self", function.__self__)]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    defaults = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    return [*((name, cell.cell_contents) for name, cell in cells if cell != CellType()), *defaults]


def _attributes(tree: Any) -> list[tuple[str, Any]]:
    slots = [name for base in type(tree).__mro__ for name in _names(base.__dict__.get("__slots__", ()))]
    slotted = [(name, getattr(tree, name)) for name in slots if name not in ("__dict__", "__weakref__") and hasattr(tree, name)]
    return [*getattr(tree, "__dict__", {}).items(), *slotted]


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


PASSED_ON = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _arguments(forward: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function, and the kind of each; none where it does not say."""
    try:
        return {name: argument.kind for name, argument in inspect.signature(forward).parameters.items()}
    except (TypeError, ValueError):
        return {}


def handed_back(model: nn.Module, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """The parts of a result that are state for the next call: objects under the name of an argument of ``forward`` that this call did without.

    Their width is the model's own business, as long as it takes them back itself.
    """
    if not isinstance(result, Mapping) and not is_dataclass(result):
        return frozenset()
    names, parts = without(model, args, kwargs), dict(_parts(result) or ())
    holders = (torch.Tensor, np.ndarray, list, tuple, Mapping, *NUMBERS, *SILENT)
    return frozenset(str(key) for key, part in parts.items() if key in names and not isinstance(part, holders))


def without(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """The names of arguments of ``forward`` that a call did without."""
    own = _arguments(model.forward)
    names = [name for name, kind in own.items() if kind not in PASSED_ON]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(names) < len(own) and len(args) <= len(names):  # a wrapper, which hands the rest on to what it wraps
        names += [name for kind in {type(module) for module in model.modules()} for name in _arguments(kind.forward)]
    return frozenset(name for name in names if arguments.get(name) is None)


def selected(every: list[Item], selection: Selection) -> list[Item]:
    """The items that the user asks for: by a name (``"logits"``, ``"states.0"``), the index at the top, a predicate ``(path, tensor) -> bool``, or several.

    Raises :class:`~graphprune.errors.UnknownName` when one of them finds nothing.
    """
    if selection is None:
        return every
    wanted = list(selection) if isinstance(selection, list | tuple | set | frozenset) else [selection]
    tops = list(dict.fromkeys(path.partition(".")[0] for path, _ in every))
    chosen: set[int] = set()
    for one in wanted:
        hits = {index for index, (path, item) in enumerate(every) if _meant(one, path, item, tops)}
        if not hits:
            paths = ", ".join(path or "the result itself" for path, _ in every[:20])
            raise UnknownName(f"outputs={one!r} finds nothing in what the model returns; there are: {paths or 'no tensors'}")
        chosen |= hits
    return [item for index, item in enumerate(every) if index in chosen]


def _meant(one: str | int | Callable[..., Any], path: str, item: Any, tops: list[str]) -> bool:
    if isinstance(one, str):
        return path == one or path.startswith(f"{one}.")
    if isinstance(one, int):
        return -len(tops) <= one < len(tops) and path.partition(".")[0] == tops[one]
    if not callable(one):
        raise BadInput(f"outputs={one!r} is neither a name, an index nor a function (path, tensor) -> bool")
    return isinstance(item, torch.Tensor) and bool(one(path, item))
