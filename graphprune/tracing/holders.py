"""What can be filled, and is put back as it was: a :class:`Holder` for each kind of it.

>>> seen = [1]
>>> holder = SequenceItems(seen)
>>> seen.append(2)
>>> holder.changed(), holder.put_back(), seen
(True, None, [1])
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import repeat
from operator import is_
from types import CellType, FunctionType, ModuleType
from typing import Any, Protocol

import torch
from torch import nn

BARE = frozenset(nn.Module().__dict__)  # what every module holds
ABSENT = object()


class Holder(Protocol):
    """Something that code can fill, and what was in it."""

    def changed(self) -> bool:
        """Whether something else is in it now."""
        ...

    def put_back(self) -> None:
        """Fill it with what was in it."""
        ...


class SequenceItems:
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


class MappingItems:
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


class NameMeanings:
    """What some names mean in a module of the user's."""

    def __init__(self, space: dict[str, Any]) -> None:
        self.space = space
        self.before: dict[str, Any] = {}

    def more(self, names: frozenset[str]) -> list[Any]:
        """What further names mean, of those that mean anything."""
        now = {name: self.space.get(name, ABSENT) for name in names}
        for name, item in now.items():
            self.before.setdefault(name, item)
        return [item for item in now.values() if item is not ABSENT]

    def changed(self) -> bool:
        return not all(map(is_, map(self.space.get, self.before, repeat(ABSENT)), self.before.values()))

    def put_back(self) -> None:
        for name, item in self.before.items():
            now = self.space.get(name, ABSENT)
            if now is item:
                continue
            if item is not ABSENT:
                self.space[name] = item
            elif not isinstance(now, ModuleType):  # an import inside a function happens once
                del self.space[name]


class ClassAttributes:
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
            if vars(self.kind).get(name, ABSENT) is not item:
                setattr(self.kind, name, item)


class ModuleAttributes:
    """What a module of the user's holds beside what every module has."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes, self.before = attributes, {name: item for name, item in attributes.items() if name not in BARE}

    def changed(self) -> bool:
        return True  # comparing takes as long as putting back

    def put_back(self) -> None:
        for name in [name for name in self.attributes if name not in BARE and name not in self.before]:
            del self.attributes[name]
        self.attributes.update(self.before)


class FunctionAttributes:
    """What functions hold beside their code, all those that were reached in one: most hold nothing."""

    def __init__(self) -> None:
        self.functions: list[FunctionType] = []
        self.before: list[dict[str, Any]] = []

    def add(self, function: FunctionType) -> list[Any]:
        """One more of them; returns what it holds."""
        self.functions.append(function)
        self.before.append(dict(function.__dict__))
        return list(function.__dict__.values())

    def differing(self) -> Iterator[tuple[FunctionType, dict[str, Any]]]:
        for function, before in zip(self.functions, self.before, strict=True):
            now = function.__dict__
            if (now or before) and (now.keys() != before.keys() or not all(map(is_, now.values(), map(before.get, now)))):
                yield function, before

    def changed(self) -> bool:
        return any(True for _ in self.differing())

    def put_back(self) -> None:
        for function, before in self.differing():
            function.__dict__.clear()
            function.__dict__.update(before)


class SlotContents:
    """What an object holds in slots."""

    def __init__(self, holder: Any, names: Iterable[str]) -> None:
        self.holder, self.before = holder, {name: getattr(holder, name, ABSENT) for name in names}

    def changed(self) -> bool:
        return any(getattr(self.holder, name, ABSENT) is not item for name, item in self.before.items())

    def put_back(self) -> None:
        for name, item in self.before.items():
            if item is not ABSENT:
                object.__setattr__(self.holder, name, item)
            elif hasattr(self.holder, name):
                object.__delattr__(self.holder, name)


class TensorEntries:
    """The entries of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version, self.before = tensor, tensor._version, tensor.detach().clone()

    def changed(self) -> bool:
        return self.tensor._version != self.version

    def put_back(self) -> None:
        with torch.no_grad():
            self.tensor.copy_(self.before)


class CellContent:
    """What a name of a closure means."""

    def __init__(self, cell: CellType) -> None:
        self.cell = cell
        self.before = self.now()

    def now(self) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # it is not filled
            return ABSENT

    def changed(self) -> bool:
        return self.now() is not self.before

    def put_back(self) -> None:
        self.cell.cell_contents = self.before


class CacheContent:
    """What a function remembers of its calls: all of it is forgotten, if there was any new one."""

    def __init__(self, cached: Any) -> None:
        self.cached, self.misses = cached, cached.cache_info().misses

    def changed(self) -> bool:
        return self.cached.cache_info().misses != self.misses

    def put_back(self) -> None:
        self.cached.cache_clear()
        self.misses = 0
