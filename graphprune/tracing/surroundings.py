"""What a model's code keeps outside of the model: :func:`undisturbed_surroundings` puts it back as it was after a run of a copy.

Caches in globals and class attributes, lists that hooks fill, objects that copy as themselves: a run without values would leave tensors in them that no
later call of the user's own model could use. What that is, :mod:`graphprune.tracing.reachable` finds.

>>> import torch
>>> seen, net = [], nn.Linear(2, 2)
>>> _ = net.register_forward_hook(lambda *_: seen.append("run"))
>>> with undisturbed_surroundings(net):
...     _ = net(torch.zeros(1, 2))
>>> seen
[]
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .reachable import Reachable
from .trees import modules_of

Result = TypeVar("Result")
TIMES = 4  # as many frames as Python allows


@contextmanager
def undisturbed_surroundings(*models: nn.Module) -> Iterator[None]:
    """What the code of models can reach outside of them is put back at the end, also after an error."""
    surroundings = _surroundings(models)
    try:
        with _deeper:
            yield
    finally:
        surroundings.put_back()


def apart(call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """What a call returns; context variables that it sets are as they were afterwards, and what it compiles as it goes runs as it is written.

    >>> number = ContextVar("number", default=1)
    >>> apart(number.set, 2) is not None, number.get()
    (True, 1)
    """
    with _as_written():
        return copy_context().run(call, *args, **kwargs)


@contextmanager
def _as_written() -> Iterator[None]:
    """Inside, functions that torch has compiled run as they are written: compiled, they would hide their calls, and be compiled for a recorder.

    torch has one such switch for all threads, so it is turned by the first that needs it and turned back by the last.
    """
    global _written, _stance
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled
        yield
        return
    with _turning:
        _written += 1
        if _written == 1:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
    try:
        yield
    finally:
        with _turning:
            _written -= 1
            if _written == 0:
                _stance.__exit__(None, None, None)


_turning, _written = threading.Lock(), 0
_stance: Any = None


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """The same for models that run themselves, no copies of theirs: what the code of their own modules changes in these is put back as well.

    Counters, lists, caches and buffers of classes that are not torch's: torch's norms keep what was measured anew.

    >>> import torch
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
    inside = Reachable()
    with ExitStack() as scopes:
        for model in models:
            scopes.enter_context(undisturbed_surroundings(model))
            for _, module in modules_of(model):
                inside.inside(module)
        try:
            yield
        finally:
            inside.put_back()


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

    surroundings: Reachable | None = None


_request: ContextVar[_Request | None] = ContextVar("request", default=None)


def _surroundings(models: Iterable[nn.Module]) -> Reachable:
    """What surrounds the models, as it is now."""
    request = _request.get()
    known = request.surroundings if request is not None else None
    surroundings = Reachable() if known is None or known.changed() else known
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
