"""Ways through a module that the run did not take: a second forward method that an exporter switches to, code behind a flag.

Such code may read a size that no call of the run read (``self.width``), which would keep its old value in the cut model and fail there, long after the cut.
:func:`ways` finds the methods and flags whose code names such a size, and keeps those with which the model runs on the example and returns results
of the same shapes. They are further examples of the run: what they ask of sizes is solved like everything else, and checked against the oracle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from dis import get_instructions
from types import MethodType
from typing import Any

import torch
from torch import nn

from .dice import same_dice
from .foreign import foreign, methods, named
from .outputs import items
from .paths import instead
from .sizes import leaves
from .surroundings import undisturbed_surroundings
from .trees import modules_of, replace

MOST = 4  # ways that are tried
Swap = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, repr=False)
class Way:
    """The example, run with another method in place of ``forward``, or with a flag turned, in all modules that have it."""

    name: str
    flag: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        copied = lambda tensor: tensor.detach().clone()  # noqa: E731
        return self.run(model, replace(self.args, copied), replace(self.kwargs, copied))

    def __repr__(self) -> str:
        return f"<Way: {self.name} {'turned' if self.flag else 'as forward'}>"

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model, called on other inputs."""
        with ExitStack() as scopes:
            for _, module in modules_of(model):
                if self.flag and type(_asked(module, self.name)) is bool:
                    scopes.enter_context(_turned(module, self.name))
                elif not self.flag and any(method.__name__ == self.name for method in _own_methods(module)):
                    scopes.enter_context(instead(module, MethodType(getattr(type(module), self.name), module)))
            return model(*args, **kwargs)


@contextmanager
def _turned(module: nn.Module, flag: str) -> Iterator[None]:
    before = module.__dict__.get(flag)  # of the class, where there is none
    module.__dict__[flag] = not getattr(module, flag)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[flag]
        else:
            module.__dict__[flag] = before


def _own_methods(module: nn.Module) -> Iterator[Any]:
    for base in type(module).__mro__:
        if not foreign(base):
            yield from methods(base)


def ways(model: nn.Module, graph: Any, twin: Callable[[], nn.Module], swap: Swap) -> tuple[Way, ...]:
    """The ways that hold for the model. ``graph`` is that of its run, ``twin`` makes a throw-away copy, ``swap`` a tensor that it can be called with."""
    args, kwargs = graph.example
    candidates = [Way(name, flag, args, kwargs) for name, flag in _offers(model, graph)[:MOST]]
    runs = lambda way: lambda copy: way.run(copy, replace(args, swap), replace(kwargs, swap))  # noqa: E731
    running = [(way, shapes) for way in candidates if (shapes := _shapes(model, twin, runs(way))) is not None]
    if not running:
        return ()
    if graph.state or graph.asked.outputs is not None:  # the graph knows only what matters of the result
        plain = _shapes(model, twin, lambda copy: copy(*replace(args, swap), **replace(kwargs, swap)))
    else:
        plain = [(path, value.shape) for path, value in zip(graph.paths, graph.outputs, strict=True)]
    return tuple(way for way, shapes in running if shapes == plain)


def _offers(model: nn.Module, graph: Any) -> list[tuple[str, bool]]:
    """What the code of modules offers that have sizes which no call of the run read."""
    read = {leaf[1] for call in graph.calls for leaf in leaves(call.expr) if leaf[0] == "attr"}
    idle: dict[str, set[frozenset[str]]] = {}
    for path in graph.symbols:
        if path not in read:
            idle.setdefault(path[0], set()).add(frozenset(part for part in path[1:] if isinstance(part, str)))
    modules = [(name, module) for name, module in modules_of(model) if not foreign(type(module))]
    reached = _reached([module for _, module in modules]) if idle else set()
    offers: dict[tuple[str, bool], None] = {}
    for name, module in modules:
        if name in idle:
            offers |= dict.fromkeys(_offered(module, idle[name], reached))
    return list(offers)


def _reached(modules: list[nn.Module]) -> set[str]:
    """The names of methods that a forward may come to."""
    words: dict[str, set[str]] = {}
    for kind in {type(module): module for module in modules}.values():
        for method in _own_methods(kind):
            words.setdefault(method.__name__, set()).update(named(method.__code__), named(inspect.unwrap(method).__code__))
    reached, todo = {"forward"}, ["forward"]
    while todo:
        fresh = (words.get(todo.pop(), set()) & words.keys()) - reached
        reached |= fresh
        todo += fresh
    return reached


def _offered(module: nn.Module, idle: set[frozenset[str]], reached: set[str]) -> Iterator[tuple[str, bool]]:
    """Methods that are other forwards, and flags that a forward comes to, whose code names one of the sizes (all parts of its name: ``self.config.width``)."""
    helpers: dict[str, frozenset[str]] = {}
    for method in _own_methods(module):
        helpers.setdefault(method.__name__, named(method.__code__))
    for method in _own_methods(module):
        words = _with_helpers(method.__name__, helpers)
        if method.__name__ in ("__init__", "train", "eval") or not any(parts <= words for parts in idle):
            continue
        if "forward" in method.__name__ and method.__name__ != "forward":
            yield method.__name__, False
        for word in sorted(words - {"training"}) if method.__name__ in reached else ():
            if type(_asked(module, word)) is bool and _switched(module, word):
                yield word, True


def _asked(module: nn.Module, name: str) -> Any:
    """An attribute of a module, None where there is none; a class that answers for others may raise whatever it likes."""
    try:
        return getattr(module, name, None)
    except Exception:
        return None


def _switched(module: nn.Module, flag: str) -> bool:
    """Whether a flag is one that somebody turns later: an attribute of the class, or one that ``__init__`` sets to a constant.

    A flag that is computed there, or given, says how the module was built.
    """
    if flag not in module.__dict__:
        return True
    for base in type(module).__mro__:
        build = None if foreign(base) else vars(base).get("__init__")
        if build is None:
            continue
        steps = list(get_instructions(build))
        for value, _, store in zip(steps, steps[1:], steps[2:], strict=False):
            if store.opname == "STORE_ATTR" and store.argval == flag and type(value.argval) is bool:
                return True
    return False


def _with_helpers(method: str, helpers: Mapping[str, frozenset[str]]) -> set[str]:
    """The names that a method asks for, also through other methods of the module."""
    words: set[str] = set()
    todo = [method]
    while todo:
        fresh = helpers[todo.pop()] - words
        words |= fresh
        todo += [word for word in fresh if word in helpers]
    return words


def _shapes(model: nn.Module, twin: Callable[[], nn.Module], call: Callable[[nn.Module], Any]) -> list[tuple[Any, ...]] | None:
    """Paths and shapes of what a call returns; None where it fails, as a way that is not meant for this may."""
    try:
        with torch.no_grad(), same_dice(), undisturbed_surroundings(model):
            return [(path, tuple(item.shape)) for path, item in items(call(twin())) if isinstance(item, torch.Tensor)]
    except Exception:
        return None
