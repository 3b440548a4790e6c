"""Whose code something is, and what it can name: :func:`foreign`, :func:`methods`, :func:`named`.

>>> sorted(named(compile("a.b(c)", "", "exec")))
['a', 'b', 'c']
"""

from __future__ import annotations

import sys
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

FOREIGN = frozenset(("torch", "numpy", "builtins", "__builtin__", "graphprune", *sys.stdlib_module_names)) - {"__main__"}
_CODE: WeakKeyDictionary[CodeType, frozenset[str]] = WeakKeyDictionary()
_TEXTS: WeakKeyDictionary[CodeType, frozenset[str]] = WeakKeyDictionary()
_METHODS: WeakKeyDictionary[type, tuple[FunctionType, ...]] = WeakKeyDictionary()


def foreign(item: type | FunctionType) -> bool:
    """Whether a class or a function is torch's, Python's or this package's own."""
    return not item.__module__ or is_foreign(item.__module__)


def is_foreign(module: str) -> bool:
    return module.partition(".")[0] in FOREIGN


def methods(kind: type) -> tuple[FunctionType, ...]:
    if kind not in _METHODS:
        plain = [getattr(item, "__func__", getattr(item, "fget", item)) for item in vars(kind).values()]
        _METHODS[kind] = tuple(item for item in plain if isinstance(item, FunctionType))
    return _METHODS[kind]


def named(code: CodeType) -> frozenset[str]:
    """The names that a function asks for, also in functions inside it."""
    if code not in _CODE:
        _CODE[code] = frozenset(code.co_names).union(*(named(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
    return _CODE[code]


def texts(code: CodeType) -> frozenset[str]:
    """The names that stand as text in a function, also in functions inside it."""
    if code not in _TEXTS:
        own = (item for item in code.co_consts if type(item) is str and item.replace(".", "_").isidentifier())
        _TEXTS[code] = frozenset(own).union(*(texts(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
    return _TEXTS[code]
