"""Copying a tree of modules without walking every container twice: :func:`duplicate`.

What ``copy.deepcopy`` gives, for modules that copy in the ordinary way (their ``__dict__``); any module that has its own
idea of copying is handed to ``copy.deepcopy``.

>>> twin = duplicate(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), {})
>>> twin[0].out_features, len(twin)
(3, 2)
"""

from __future__ import annotations

import copy
import io
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import BadModel

PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size, types.FunctionType,
                   types.BuiltinFunctionType, type(...), type(NotImplemented), range, property})  # fmt: skip
OWN = frozenset(key for key, value in nn.Module().__dict__.items() if type(value) in (dict, OrderedDict, set))
ORIGIN = "rewritten_from"  # a class made by graphprune.cutting.rewrite has it: the user's class, like which it copies
_SLOTS: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()
_ORDINARY: WeakKeyDictionary[type, bool] = WeakKeyDictionary()  # a rewritten module is of a class of its own


def ordinary(kind: type) -> bool:
    """Whether modules of this class copy by their ``__dict__`` alone."""
    kind = kind.__dict__.get(ORIGIN, kind)
    if getattr(kind.__dict__.get("__deepcopy__"), "__module__", "") == parametrize.__name__:
        kind = kind.__bases__[0]  # torch's class for a module with a parametrisation, which copies like the one it was made of
    if kind not in _ORDINARY:
        base = nn.Module
        same = getattr(kind, "__getstate__", None) is getattr(base, "__getstate__", None) and kind.__reduce_ex__ is base.__reduce_ex__
        _ORDINARY[kind] = same and kind.__reduce__ is base.__reduce__ and not hasattr(kind, "__deepcopy__") and kind.__new__ is object.__new__
    return _ORDINARY[kind]


def duplicate(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; ``memo`` maps the id of what was copied (or is to be exchanged) to its copy, as in ``copy.deepcopy``."""
    kind = type(value)
    if kind in PLAIN:
        return value
    known = memo.get(id(value), memo)
    if known is not memo:
        return known
    if kind is dict or kind is OrderedDict:
        twin = memo[id(value)] = kind()
        for key, item in value.items():
            twin[key if type(key) in PLAIN else duplicate(key, memo)] = item if type(item) in PLAIN else duplicate(item, memo)
        return twin
    if kind is list:
        twin = memo[id(value)] = []
        twin.extend([duplicate(item, memo) for item in value])
        return twin
    if kind is tuple:
        if PLAIN.issuperset(map(type, value)):
            return value
        items = [duplicate(item, memo) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else memo.setdefault(id(value), tuple(items))
    if isinstance(value, nn.Module) and ordinary(kind):
        return _module(value, kind, memo)
    return _other(value, kind, memo)


def _other(value: Any, kind: type, memo: dict[int, Any]) -> Any:
    """A copy by ``copy.deepcopy``; what that refuses (a lock, a compiled function, a handle) is shared, and only that of the object that holds it."""
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise BadModel(
                f"the model holds a {kind.__name__}, of which there is no copy, and a run would use it up; let it hold what it is made of"
            ) from error
        if isinstance(value, nn.Module | torch.Tensor):
            raise
        for key in list(memo)[known:]:  # parts of a copy that came to no end
            del memo[key]
        plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__new__ is object.__new__ and not hasattr(kind, "__deepcopy__")
        if not plain or not getattr(value, "__dict__", None) or "__setstate__" in dir(kind) or slots_of(kind):
            memo[id(value)] = value
            return value
    twin = memo[id(value)] = object.__new__(kind)
    twin.__dict__.update((name, duplicate(item, memo)) for name, item in value.__dict__.items())
    return twin


def _module(module: nn.Module, kind: type, memo: dict[int, Any]) -> nn.Module:
    twin = memo[id(module)] = nn.Module.__new__(kind)
    state = module.__dict__.copy()
    state.pop("_compiled_call_impl", None)  # as nn.Module's own copying does
    for key, value in state.items():
        item_kind = type(value)
        if item_kind in PLAIN:
            continue
        # Every module owns these containers, so that an empty one needs no note in the memo.
        if key in OWN and not value:
            state[key] = item_kind()
        elif item_kind is not tuple or not PLAIN.issuperset(map(type, value)):
            state[key] = duplicate(value, memo)
    if kind.__setstate__ is nn.Module.__setstate__:
        twin.__dict__.update(state)
    else:
        twin.__setstate__(state)
    for name in slots_of(kind):
        if hasattr(module, name):
            object.__setattr__(twin, name, duplicate(getattr(module, name), memo))
    return twin


def slots_of(kind: type) -> tuple[str, ...]:
    """The attributes of a class that lie outside of ``__dict__``; ``copy.deepcopy`` of a module loses them.

    >>> slots_of(type("Slotted", (nn.Module,), {"__slots__": ("width",)}))
    ('width',)
    """
    if kind not in _SLOTS:
        names = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
        every = [name for each in names for name in ((each,) if isinstance(each, str) else each)]
        members = [name for name in every if name not in ("__dict__", "__weakref__")]
        _SLOTS[kind] = tuple(name if name[:2] != "__" else _mangled(kind, name) for name in members)
    return _SLOTS[kind]


def _mangled(kind: type, name: str) -> str:
    """The name under which a class keeps a private slot of its own."""
    owner = next(base for base in kind.__mro__ if name in base.__dict__.get("__slots__", ()))
    return f"_{owner.__name__.lstrip('_')}{name}"
