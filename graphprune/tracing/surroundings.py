"""What a model's code keeps outside of the model: :func:`undisturbed_surroundings` puts it back as it was after a run of a copy.

Caches in globals and class attributes, lists that hooks fill, objects that copy as themselves: a run without values would leave tensors in them that no
later call of the user's own model could use. Looked for is whatever the code of the modules and of their hooks can name: globals, closures, class
attributes, and the attributes of plain objects.

>>> seen, net = [], nn.Linear(2, 2)
>>> _ = net.register_forward_hook(lambda *_: seen.append("run"))
>>> with undisturbed_surroundings(net):
...     _ = net(torch.zeros(1, 2))
>>> seen
[]
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, MutableSet
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .trees import PLAIN, modules_of

CACHED = type(functools.lru_cache(lambda: None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
FOREIGN = frozenset(("torch", "numpy", "builtins", "__builtin__", "graphprune", *sys.stdlib_module_names)) - {"__main__"}
TIMES = 4  # as many frames as Python allows
BARE = frozenset(nn.Module().__dict__)  # what every module holds
HOLDERS = (SimpleNamespace, threading.local)  # classes of Python's own whose objects hold what others put there
DEPTH = 3  # how deep objects and containers are looked into
_CODE: WeakKeyDictionary[CodeType, frozenset[str]] = WeakKeyDictionary()
_METHODS: WeakKeyDictionary[type, tuple[FunctionType, ...]] = WeakKeyDictionary()
_ABSENT = object()


@contextmanager
def undisturbed_surroundings(*models: nn.Module) -> Iterator[None]:
    """What the code of models can reach outside of them is put back at the end, also after an error."""
    kept = _Kept()
    for model in models:
        for _, module in modules_of(model):
            kept.module(module)
    for hooks in (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks):
        for hook in hooks.values():
            kept.callable(hook)
    try:
        with _deeper:
            yield
    finally:
        kept.put_back()


class _Deeper:
    """Room for frames: a run of ours takes more of them for every module inside a module than the model's own, which may be near the limit."""

    def __init__(self) -> None:
        self.lock, self.inside, self.limit = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.limit = sys.getrecursionlimit()
                sys.setrecursionlimit(TIMES * self.limit)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                sys.setrecursionlimit(self.limit)


_deeper = _Deeper()


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """The same for models that run themselves, no copies of theirs: what the code of their own modules changes in these is put back as well.

    Counters, lists, caches and buffers of classes that are not torch's: torch's norms keep what was measured anew.

    >>> class Counts(nn.Linear):
    ...     __module__, calls = "yours", 0
    ...     def forward(self, x):
    ...         self.calls += 1
    ...         return super().forward(x)
    >>> net = Counts(2, 2)
    >>> with unchanged(net):
    ...     _ = net(torch.zeros(1, 2))
    >>> net.calls
    0
    """
    kept = _Kept()
    with ExitStack() as scopes:
        for model in models:
            scopes.enter_context(undisturbed_surroundings(model))
            for _, module in modules_of(model):
                kept.inside(module)
        try:
            yield
        finally:
            kept.put_back()


class _Kept:
    """What was found, and how to put it back: by the id of what was looked at."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.alive: list[Any] = []  # so that ids stay theirs
        self.undo: list[Callable[[], None]] = []

    def put_back(self) -> None:
        for undo in reversed(self.undo):
            undo()

    def new(self, item: Any) -> bool:
        if id(item) in self.seen:
            return False
        self.seen.add(id(item))
        self.alive.append(item)
        return True

    def module(self, module: nn.Module) -> None:
        attributes = module.__dict__
        for name in HOOKS:
            for hook in attributes.get(name, {}).values():
                self.callable(hook)
        for name, item in attributes.items():
            kind = type(item)
            if isinstance(item, FunctionType | functools.partial):
                self.callable(item)
            elif kind not in PLAIN and name[0] != "_" and getattr(kind, "__deepcopy__", None) is not None and not isinstance(item, torch.Tensor | nn.Module):
                self.value(item, 1)  # it may copy as itself
        self.kind(type(module))

    def inside(self, module: nn.Module) -> None:
        """What a module of the user's holds beside its parameters and modules."""
        if foreign(type(module)) or isinstance(module, nn.modules.batchnorm._NormBase) or not self.new(module):
            return
        own = module.__dict__
        before = {name: item for name, item in own.items() if name not in BARE}

        def undo() -> None:
            for name in [name for name in own if name not in BARE and name not in before]:
                del own[name]
            own.update(before)

        self.undo.append(undo)
        for item in (*before.values(), *module._buffers.values()):
            if isinstance(item, torch.Tensor):
                self.tensor(item)
            else:
                self.value(item, 1)

    def tensor(self, tensor: torch.Tensor) -> None:
        """The entries of a tensor, which are written back where they were written to."""
        if tensor.is_meta or tensor.is_inference() or tensor.layout is not torch.strided or not self.new(tensor):
            return
        version, entries = tensor._version, tensor.detach().clone()

        def undo() -> None:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(entries)

        self.undo.append(undo)

    def kind(self, kind: type) -> None:
        """A class of the user: what its attributes hold, and what its methods can name."""
        if not self.new(kind):
            return
        for base in kind.__mro__:
            if foreign(base) or (base is not kind and not self.new(base)):
                continue
            self.attributes(base)
            for method in methods(base):
                self.function(method)

    def attributes(self, kind: type) -> None:
        before = {name: item for name, item in vars(kind).items() if not callable(item) and name[:2] != "__"}
        for item in before.values():
            self.value(item, 1)

        def undo() -> None:
            for name, item in list(vars(kind).items()):
                if before.get(name, _ABSENT) is not item and not callable(item) and name[:2] != "__":
                    if name in before:
                        setattr(kind, name, before[name])
                    else:
                        delattr(kind, name)
            for name in before.keys() - vars(kind).keys():
                setattr(kind, name, before[name])

        self.undo.append(undo)

    def callable(self, item: Any) -> None:
        if isinstance(item, functools.partial):
            for part in (item.func, *item.args, *item.keywords.values()):
                self.callable(part) if callable(part) else self.value(part, 1)
        elif isinstance(item, MethodType):
            self.value(item.__self__, 1)
            self.callable(item.__func__)
        elif isinstance(item, FunctionType):
            self.function(item)
        else:
            self.value(item, 1)

    def function(self, function: FunctionType) -> None:
        """The globals and the closure of a function; functions of one code (those that a function makes) share the globals, and have closures of their own."""
        if self.new(function.__code__):
            names = named(function.__code__)
            for item in self.space(function.__globals__, names):
                if type(item) is ModuleType and not _is_foreign(item.__name__) and item.__dict__ is not function.__globals__:
                    self.space(item.__dict__, names)
        for cell in function.__closure__ or ():
            if not self.new(cell):
                continue
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self.value(content, 1)
            self.undo.append(lambda cell=cell, content=content: setattr(cell, "cell_contents", content) if cell.cell_contents is not content else None)

    def space(self, space: dict[str, Any], names: frozenset[str]) -> list[Any]:
        """What some names mean in a module of the user's; returns it."""
        before = {name: space.get(name, _ABSENT) for name in names}
        present = [item for item in before.values() if item is not _ABSENT]
        for item in present:
            self.value(item, 1)
        self.undo.append(lambda: _rebind(space, before))
        return present

    def value(self, item: Any, depth: int) -> None:
        """What a name holds: its content if it can be filled."""
        kind = type(item)
        if kind in PLAIN or isinstance(item, torch.Tensor | ModuleType) or depth > DEPTH:
            return
        if isinstance(item, CACHED):
            if self.new(item):
                misses = item.cache_info().misses
                self.undo.append(lambda: item.cache_clear() if item.cache_info().misses != misses else None)
                self.callable(item.__wrapped__)
        elif isinstance(item, FunctionType):
            if not foreign(item):
                self.function(item)
        elif isinstance(item, type):
            if not foreign(item):
                self.kind(item)
        elif isinstance(item, MutableMapping | list | MutableSet | deque):
            if self.new(item):
                self.undo.append(_filling(item))
                for part in list((value for _, value in _entries(item)) if isinstance(item, MutableMapping) else item)[:1000]:
                    if type(part) not in PLAIN:
                        self.value(part, depth + 1)
        elif isinstance(item, MethodType | functools.partial):
            self.callable(item)
        elif (kind in HOLDERS or not foreign(kind)) and hasattr(item, "__dict__") and self.new(item):
            self.value(item.__dict__, depth)


def _filling(holder: Any) -> Callable[[], None]:
    """Puts the entries of a container back, if they are others."""
    before = _entries(holder) if isinstance(holder, MutableMapping) else list(holder)

    def undo() -> None:
        if isinstance(holder, MutableMapping):
            now = _entries(holder)
            if len(now) == len(before) and all(a is c and b is d for (a, b), (c, d) in zip(now, before, strict=True)):
                return
        elif len(holder) == len(before) and all(a is b for a, b in zip(holder, before, strict=True)):
            return
        holder.clear()
        if isinstance(holder, list | deque):
            holder.extend(before)
        elif isinstance(holder, MutableMapping):
            holder.update(before)
        else:
            for item in before:
                holder.add(item)

    return undo


def _entries(holder: MutableMapping) -> list[tuple[Any, Any]]:
    """What a mapping holds; of a dictionary that makes entries as they are asked for (a library's table of modules to import), those that are there."""
    return list(dict.items(holder) if isinstance(holder, dict) else holder.items())


def _rebind(space: dict[str, Any], before: dict[str, Any]) -> None:
    for name, item in before.items():
        now = space.get(name, _ABSENT)
        if now is not item:
            if item is not _ABSENT:
                space[name] = item
            elif not isinstance(now, ModuleType):  # an import inside a function happens once
                del space[name]


def foreign(item: type | FunctionType) -> bool:
    """Whether a class or a function is torch's, Python's or this package's own."""
    return not item.__module__ or _is_foreign(item.__module__)


def _is_foreign(module: str) -> bool:
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
