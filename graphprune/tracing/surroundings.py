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
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, MutableMapping, MutableSet
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .trees import PLAIN, modules_of

CACHED = type(functools.lru_cache(lambda: None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
FOREIGN = frozenset(("torch", "numpy", "builtins", "__builtin__", "graphprune", *sys.stdlib_module_names)) - {"__main__"}
TIMES = 4  # as many frames as Python allows
QUIET = PLAIN | {dict, OrderedDict, list, tuple, set, torch.Tensor, nn.Parameter}  # attributes of modules of these kinds are copied, and hold no code
BARE = frozenset(nn.Module().__dict__)  # what every module holds
HOLDERS = (SimpleNamespace, threading.local)  # classes of Python's own whose objects hold what others put there
DEPTH = 3  # how deep objects and containers are looked into
_CODE: WeakKeyDictionary[CodeType, frozenset[str]] = WeakKeyDictionary()
_METHODS: WeakKeyDictionary[type, tuple[FunctionType, ...]] = WeakKeyDictionary()
_ABSENT = object()


@contextmanager
def undisturbed_surroundings(*models: nn.Module) -> Iterator[None]:
    """What the code of models can reach outside of them is put back at the end, also after an error."""
    surroundings = _surroundings(models)
    try:
        with _deeper:
            yield
    finally:
        surroundings.put_back()


@contextmanager
def looked_for_once() -> Iterator[None]:
    """Inside, what surrounds a model is looked for once, and again only where something else than a run has changed it.

    A request runs a model and its copies dozens of times, and the code of a library names tens of thousands of things.
    """
    outermost = _request.get() is None
    token = _request.set(_Request() if outermost else _request.get())
    try:
        yield
    finally:
        _request.reset(token)


@dataclass
class _Request:
    """What surrounds the models that a request runs, as it was before each of these runs."""

    surroundings: _Surroundings | None = None


_request: ContextVar[_Request | None] = ContextVar("request", default=None)


def _surroundings(models: Iterable[nn.Module]) -> _Surroundings:
    """What surrounds the models, as it is now."""
    request = _request.get()
    known = request.surroundings if request is not None else None
    surroundings = _Surroundings() if known is None or known.changed() else known
    surroundings.look(models)
    if request is not None:
        request.surroundings = surroundings
    return surroundings


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
    inner = _Surroundings()
    with ExitStack() as scopes:
        for model in models:
            scopes.enter_context(undisturbed_surroundings(model))
            for _, module in modules_of(model):
                inner.inside(module)
        try:
            yield
        finally:
            inner.put_back()


class _Holder(Protocol):
    """Something that code can fill, and what was in it."""

    def changed(self) -> bool:
        """Whether something else is in it now."""
        ...

    def put_back(self) -> None:
        """Fill it with what was in it."""
        ...


class _Surroundings:
    """The holders that code can reach, each looked at once: by the id of what was looked at."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.alive: list[Any] = []  # so that ids stay theirs
        self.holders: list[_Holder] = []
        self.spaces: dict[int, _Names] = {}  # by the id of what holds the names of a module

    def look(self, models: Iterable[nn.Module]) -> None:
        """Add what the code of the models, of their hooks and of the hooks of all modules can reach."""
        for model in models:
            for _, module in modules_of(model):
                self.module(module)
        for hooks in (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks):
            for hook in hooks.values():
                self.callable(hook)

    def changed(self) -> bool:
        return any(holder.changed() for holder in self.holders)

    def put_back(self) -> None:
        for holder in reversed(self.holders):
            if holder.changed():
                holder.put_back()

    def new(self, item: Any) -> bool:
        if id(item) in self.seen:
            return False
        self.seen.add(id(item))
        self.alive.append(item)
        return True

    def module(self, module: nn.Module) -> None:
        attributes = module.__dict__
        for name in HOOKS:
            for hook in (attributes.get(name) or {}).values():
                self.callable(hook)
        for name, item in attributes.items():
            kind = type(item)
            if kind in QUIET:
                continue
            if isinstance(item, FunctionType | functools.partial):
                self.callable(item)
            elif name[0] != "_" and getattr(kind, "__deepcopy__", None) is not None and not isinstance(item, torch.Tensor | nn.Module):
                self.value(item, 1)  # it may copy as itself
        self.kind(type(module))

    def inside(self, module: nn.Module) -> None:
        """What a module of the user's holds beside its parameters and modules."""
        if foreign(type(module)) or isinstance(module, nn.modules.batchnorm._NormBase) or not self.new(module):
            return
        attributes = _Attributes(module.__dict__)
        self.holders.append(attributes)
        for item in (*attributes.before.values(), *module._buffers.values()):
            if isinstance(item, torch.Tensor):
                self.tensor(item)
            else:
                self.value(item, 1)

    def tensor(self, tensor: torch.Tensor) -> None:
        """The entries of a tensor, which are written back where they were written to."""
        if not (tensor.is_meta or tensor.is_inference() or tensor.layout is not torch.strided) and self.new(tensor):
            self.holders.append(_Entries(tensor))

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
        holder = _Class(kind)
        for item in holder.before.values():
            self.value(item, 1)
        self.holders.append(holder)

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
            holder = _Cell(cell)
            if holder.before is not _ABSENT:
                self.value(holder.before, 1)
                self.holders.append(holder)

    def space(self, space: dict[str, Any], names: frozenset[str]) -> list[Any]:
        """What some names mean in a module of the user's; returns it."""
        holder = self.spaces.get(id(space))
        if holder is None:
            holder = self.spaces[id(space)] = _Names(space)
            self.holders.append(holder)
        present = holder.more(names)
        for item in present:
            self.value(item, 1)
        return present

    def value(self, item: Any, depth: int) -> None:
        """What a name holds: its content if it can be filled."""
        kind = type(item)
        if kind in PLAIN or isinstance(item, torch.Tensor | ModuleType) or depth > DEPTH:
            return
        if isinstance(item, CACHED):
            if self.new(item):
                self.holders.append(_Cache(item))
                self.callable(item.__wrapped__)
        elif isinstance(item, FunctionType):
            if not foreign(item):
                self.function(item)
        elif isinstance(item, type):
            if not foreign(item):
                self.kind(item)
        elif isinstance(item, MutableMapping | list | MutableSet | deque):
            if self.new(item):
                holder = _Mapping(item) if isinstance(item, MutableMapping) else _Sequence(item)
                self.holders.append(holder)
                for part in holder.before[:1000]:
                    if type(part) not in PLAIN:
                        self.value(part, depth + 1)
        elif isinstance(item, MethodType | functools.partial):
            self.callable(item)
        elif (kind in HOLDERS or not foreign(kind)) and hasattr(item, "__dict__") and self.new(item):
            self.value(item.__dict__, depth)


class _Sequence:
    """The entries of a list, a queue or a set."""

    def __init__(self, holder: Any) -> None:
        self.holder, self.before = holder, list(holder)

    def changed(self) -> bool:
        return len(self.holder) != len(self.before) or not all(map(is_, self.holder, self.before))

    def put_back(self) -> None:
        self.holder.clear()
        if isinstance(self.holder, list | deque):
            self.holder.extend(self.before)
        else:
            for item in self.before:
                self.holder.add(item)


class _Mapping:
    """The entries of a mapping."""

    def __init__(self, holder: Any) -> None:
        self.holder = holder
        self.keys, self.before = (list(each) for each in self.now())

    def now(self) -> tuple[Collection[Any], Collection[Any]]:
        """Keys and values; of a dictionary that makes entries as they are asked for (a library's table of modules to import), those that are there."""
        if isinstance(self.holder, dict):
            return dict.keys(self.holder), dict.values(self.holder)
        pairs = list(self.holder.items())
        return [key for key, _ in pairs], [item for _, item in pairs]

    def changed(self) -> bool:
        keys, items = self.now()
        return len(keys) != len(self.keys) or not (all(map(is_, items, self.before)) and all(map(is_, keys, self.keys)))

    def put_back(self) -> None:
        self.holder.clear()
        self.holder.update(zip(self.keys, self.before, strict=True))


class _Names:
    """What some names mean in a module of the user's."""

    def __init__(self, space: dict[str, Any]) -> None:
        self.space = space
        self.before: dict[str, Any] = {}

    def more(self, names: frozenset[str]) -> list[Any]:
        """What further names mean, of those that mean anything."""
        now = {name: self.space.get(name, _ABSENT) for name in names}
        for name, item in now.items():
            self.before.setdefault(name, item)
        return [item for item in now.values() if item is not _ABSENT]

    def changed(self) -> bool:
        return not all(map(is_, map(self.space.get, self.before, repeat(_ABSENT)), self.before.values()))

    def put_back(self) -> None:
        for name, item in self.before.items():
            now = self.space.get(name, _ABSENT)
            if now is item:
                continue
            if item is not _ABSENT:
                self.space[name] = item
            elif not isinstance(now, ModuleType):  # an import inside a function happens once
                del self.space[name]


class _Class:
    """What a class holds beside its code."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.all, self.before = list(vars(kind).values()), self.now()

    def now(self) -> dict[str, Any]:
        return {name: item for name, item in vars(self.kind).items() if not callable(item) and name[:2] != "__"}

    def changed(self) -> bool:
        everything = vars(self.kind)
        if len(everything) == len(self.all) and all(map(is_, everything.values(), self.all)):
            return False
        now = self.now()
        return now.keys() != self.before.keys() or any(now[name] is not item for name, item in self.before.items())

    def put_back(self) -> None:
        for name in self.now().keys() - self.before.keys():
            delattr(self.kind, name)
        for name, item in self.before.items():
            if vars(self.kind).get(name, _ABSENT) is not item:
                setattr(self.kind, name, item)


class _Attributes:
    """What a module of the user's holds beside what every module has."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes, self.before = attributes, {name: item for name, item in attributes.items() if name not in BARE}

    def changed(self) -> bool:
        return True  # comparing takes as long as putting back

    def put_back(self) -> None:
        for name in [name for name in self.attributes if name not in BARE and name not in self.before]:
            del self.attributes[name]
        self.attributes.update(self.before)


class _Entries:
    """The entries of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version, self.before = tensor, tensor._version, tensor.detach().clone()

    def changed(self) -> bool:
        return self.tensor._version != self.version

    def put_back(self) -> None:
        with torch.no_grad():
            self.tensor.copy_(self.before)


class _Cell:
    """What a name of a closure means."""

    def __init__(self, cell: CellType) -> None:
        self.cell = cell
        self.before = self.now()

    def now(self) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # it is not filled
            return _ABSENT

    def changed(self) -> bool:
        return self.now() is not self.before

    def put_back(self) -> None:
        self.cell.cell_contents = self.before


class _Cache:
    """What a function remembers of its calls: all of it is forgotten, if there was any new one."""

    def __init__(self, cached: Any) -> None:
        self.cached, self.misses = cached, cached.cache_info().misses

    def changed(self) -> bool:
        return self.cached.cache_info().misses != self.misses

    def put_back(self) -> None:
        self.cached.cache_clear()
        self.misses = 0


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
