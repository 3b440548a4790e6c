"""What a configuration builds, in numbers: :class:`Builds` builds each configuration once, and :func:`values` says which number is worth building with.

Building the class of a large model takes a moment, and a search asks hundreds of questions. What comes out depends on the configuration alone: within a
request (:func:`built_once`) it is remembered, whatever it is compared with. And a length follows a number evenly, as its multiple or as a quotient of another:
what it is for two values of the number says what value gives another length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

Tree = Any
Path = tuple[Any, ...]
Slot = tuple[str, int]

_built: ContextVar[dict[Any, Built | None] | None] = ContextVar("built", default=None)


@contextmanager
def built_once() -> Iterator[None]:
    """Inside, no configuration is built twice."""
    token = _built.set({}) if _built.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _built.reset(token)


@dataclass(frozen=True)
class Built:
    """The shapes of what a file of the weights holds, and the numbers at some attributes of modules, of a model that was built."""

    shapes: dict[str, tuple[int, ...]]
    numbers: dict[Path, int]

    def lengths(self) -> dict[Any, int]:
        """Every length by (tensor, axis), and every number by its place."""
        return {(name, axis): size for name, shape in self.shapes.items() for axis, size in enumerate(shape)} | self.numbers


class Builds:
    """What ``build`` makes of configurations, with the numbers at the places ``used``; None where the class refuses one.

    >>> builds = Builds(lambda tree: nn.Linear(tree["wide"], 2, device="meta"), [("", "in_features")])
    >>> builds({"wide": 3}).shapes["weight"], builds({"wide": 3}).numbers, builds.count
    ((2, 3), {('', 'in_features'): 3}, 1)
    """

    def __init__(self, build: Callable[[Tree], nn.Module], used: Iterable[Path], kind: type | None = None) -> None:
        """``kind``: the class that is built, where configurations may be remembered beyond this object."""
        self.build, self.used, self.kind, self.count = build, tuple(dict.fromkeys(used)), kind, 0
        common = _built.get() if kind is not None else None
        self.known: dict[Any, Built | None] = {} if common is None else common
        self.places = frozenset(self.used)

    def __call__(self, tree: Tree) -> Built | None:
        key = self.kind, self.places, repr(tree)
        if key not in self.known:
            self.count += 1
            self.known[key] = self._made(tree)
        return self.known[key]

    def _made(self, tree: Tree) -> Built | None:
        try:
            model = self.build(tree)
        except Exception:  # a class may refuse numbers that do not go together in any way it likes
            return None
        return Built(shapes(model), numbers(model, self.used))


def values(before: Mapping[Any, int], after: Mapping[Any, int], number: int, other: int, wanted: Mapping[Any, int]) -> set[int]:
    """The values of a number with which some length is what is ``wanted``, as far as what came out with ``number`` and with another one tells.

    >>> sorted(values({"a": 24, "b": 5}, {"a": 16, "b": 5}, 12, 8, {"a": 6, "b": 4}))
    [3, 48]
    """
    fits: set[int] = set()
    for place, length in wanted.items():
        first, second = before.get(place), after.get(place)
        if first is None or second is None or first == second:
            continue
        steps = (length - first) * (other - number)
        fits |= {number + steps // (second - first)} if steps % (second - first) == 0 else set()
        fits |= {number * first // length} if length and number * first % length == 0 else set()
    return fits


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of what a file of the weights holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if hasattr(tensor, "shape")}


def numbers(model: nn.Module, paths: Iterable[Path]) -> dict[Path, int]:
    """The whole numbers at (module, attribute, …), where there is one."""
    modules = dict(model.named_modules())
    known = {}
    for path in paths:
        value: Any = modules.get(path[0])
        for key in path[1:]:
            value = _inside(value, key)
        if type(value) is int:
            known[path] = value
    return known


def _inside(value: Any, key: Any) -> Any:
    if isinstance(value, list | tuple):
        return value[key] if type(key) is int and key < len(value) else None
    return value.get(key) if isinstance(value, dict) else getattr(value, "__dict__", {}).get(key)
