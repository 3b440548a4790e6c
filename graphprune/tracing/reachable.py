"""What the code of modules and of their hooks can reach outside of them: :class:`Reachable` finds it.

Looked for is whatever that code can name: globals, closures, class attributes, and the attributes of plain objects.

>>> net = nn.Linear(2, 2)
>>> _ = net.register_forward_hook(lambda *_, seen=[]: seen.append("run"))
>>> reachable = Reachable()
>>> reachable.look([net])
>>> reachable.changed()
False
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, MutableMapping, MutableSet, Sequence
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from .copies import slots_of
from .foreign import foreign, is_foreign, methods, named, texts
from .holders import (
    ABSENT,
    CacheContent,
    CellContent,
    ClassAttributes,
    FunctionAttributes,
    Holder,
    MappingItems,
    ModuleAttributes,
    NameMeanings,
    SequenceItems,
    SlotContents,
    TensorEntries,
)
from .trees import PLAIN, modules_of

CACHED = type(functools.lru_cache(lambda: None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
QUIET = PLAIN | {dict, OrderedDict, list, tuple, set, torch.Tensor, nn.Parameter}  # attributes of modules of these kinds are copied, and hold no code
HOLDERS = (SimpleNamespace, threading.local)  # classes of Python's own whose objects hold what others put there
OWN_SPACE = frozenset(("globals", "vars", "modules", "import_module", "setattr", "__dict__"))  # names by which code reaches names that it writes as text
DEPTH = 3  # how deep objects and containers are looked into


class Reachable:
    """The holders that code can reach, each looked at once: by the id of what was looked at."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.alive: list[Any] = []  # so that ids stay theirs
        self.holders: list[Holder] = []
        self.spaces: dict[int, NameMeanings] = {}  # by the id of what holds the names of a module
        self.functions = FunctionAttributes()
        self.holders.append(self.functions)

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
        attributes = ModuleAttributes(module.__dict__)
        self.holders.append(attributes)
        for item in (*attributes.before.values(), *module._buffers.values()):
            if isinstance(item, torch.Tensor):
                self.tensor(item)
            else:
                self.value(item, 1)

    def tensor(self, tensor: torch.Tensor) -> None:
        """The entries of a tensor, which are written back where they were written to."""
        if not (tensor.is_meta or tensor.is_inference() or tensor.layout is not torch.strided) and self.new(tensor):
            self.holders.append(TensorEntries(tensor))

    def kind(self, kind: type) -> None:
        """A class of the user: what its attributes hold, and what its methods can name."""
        if not self.new(kind):
            return
        if not foreign(type(kind)):
            self.kind(type(kind))
        for base in kind.__mro__:
            if foreign(base) or (base is not kind and not self.new(base)):
                continue
            self.attributes(base)
            for method in methods(base):
                self.function(method)

    def attributes(self, kind: type) -> None:
        holder = ClassAttributes(kind)
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
            others = [item for item in self.space(function.__globals__, names) if type(item) is ModuleType]
            others += [sys.modules[text] for text in texts(function.__code__) if type(sys.modules.get(text)) is ModuleType]  # asked for by its name
            if not OWN_SPACE.isdisjoint(names):
                names |= texts(function.__code__)
                self.space(function.__globals__, names)
            for item in others:
                if not is_foreign(item.__name__) and item.__dict__ is not function.__globals__:
                    self.space(item.__dict__, names)
        self.beside(function)
        for cell in function.__closure__ or ():
            if not self.new(cell):
                continue
            holder = CellContent(cell)
            if holder.before is not ABSENT:
                self.value(holder.before, 1)
                self.holders.append(holder)

    def beside(self, function: FunctionType) -> None:
        """What a function holds beside its code: attributes, and the defaults of its arguments."""
        if self.new(function):
            for item in (*self.functions.add(function), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                self.value(item, 1)

    def space(self, space: dict[str, Any], names: frozenset[str]) -> list[Any]:
        """What some names mean in a module of the user's; returns it."""
        holder = self.spaces.get(id(space))
        if holder is None:
            holder = self.spaces[id(space)] = NameMeanings(space)
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
                self.holders.append(CacheContent(item))
                self.callable(item.__wrapped__)
        elif isinstance(item, FunctionType):
            if not foreign(item):
                self.function(item)
        elif isinstance(item, type):
            if not foreign(item):
                self.kind(item)
        elif isinstance(item, MutableMapping | list | MutableSet | deque):
            if self.new(item):
                holder = MappingItems(item) if isinstance(item, MutableMapping) else SequenceItems(item)
                self.holders.append(holder)
                self.values(holder.before, depth + 1)
        elif kind is tuple:
            self.values(item, depth + 1)
        elif isinstance(item, MethodType | functools.partial):
            self.callable(item)
        elif kind in HOLDERS or isinstance(item, nn.Module) or not foreign(kind):
            self.object(item, depth)

    def values(self, items: Sequence[Any], depth: int) -> None:
        for item in items[:1000]:
            if type(item) not in PLAIN:
                self.value(item, depth)

    def object(self, item: Any, depth: int) -> None:
        """An object of a class of the user: its attributes, also those in slots."""
        names = slots_of(type(item))
        if not (names or hasattr(item, "__dict__")) or not self.new(item):
            return
        if names:
            holder = SlotContents(item, names)
            self.holders.append(holder)
            for part in holder.before.values():
                self.value(part, depth + 1)
        if hasattr(item, "__dict__"):
            self.value(item.__dict__, depth)
