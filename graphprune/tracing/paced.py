"""Runs of a model that wait: the original and the cut model go through their calls side by side, repair after repair.

A repair in the middle of a network needs what the repaired part before it makes of the whole calibration set. Starting anew for
each would cost layers², so every batch has a run of its own (:class:`Paced`) that stops where a watched value passes; a weight is
set while all runs wait before it. Where the calibration set is too large to be held in the middle of a network, :class:`Again`
starts anew instead; often that is so only in the first layers, and :class:`Later` waits from there on.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import BadCalibration
from ..operations.notation import Value
from .graph import Graph
from .probe import batch_inputs, watch

Tensor = torch.Tensor
Take = Callable[[Tensor], Any]
HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _Stop(BaseException):
    """Ends a run that nobody needs any longer."""


class Again:
    """Runs the model from its start for every value asked for."""

    def __init__(self, model: nn.Module, graph: Graph, batch: Any, takes: dict[int, tuple[Value, Take]]) -> None:
        self.model, self.graph, self.batch, self.takes = model, graph, batch, takes

    def until(self, value: Value) -> Any:
        """What is taken from the tensor of a watched value."""
        results: list[Any] = []

        def see(_: Value, tensor: Tensor) -> None:
            results.append(self.takes[id(value)][1](tensor))
            raise _Stop

        try:
            with torch.no_grad(), watch(self.model, self.graph, [value], see):
                args, kwargs = batch_inputs(self.batch)
                self.model(*args, **kwargs)
        except _Stop:
            pass
        return results[0]

    def close(self) -> None:
        """Nothing waits."""


class Paced:
    """Runs the model once, in a thread that waits at every watched value, or at those in ``rests`` alone (then nothing is held of the others)."""

    def __init__(self, model: nn.Module, graph: Graph, batch: Any, takes: dict[int, tuple[Value, Take]], rests: frozenset[int] | None = None) -> None:
        self.model, self.graph, self.batch, self.takes, self.rests = _own_hooks(model), graph, batch, takes, rests
        self.held: dict[int, Any] = {}
        self.go, self.ready = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.over = self.stopped = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopped:
                with torch.no_grad(), watch(self.model, self.graph, [value for value, _ in self.takes.values()], self._see):
                    args, kwargs = batch_inputs(self.batch)
                    self.model(*args, **kwargs)
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        self.over = True
        self.ready.release()

    def _see(self, value: Value, tensor: Tensor) -> None:
        found = self.takes[id(value)][1](tensor)
        if self.rests is not None and id(value) not in self.rests:
            return
        self.held[id(value)] = found
        self.ready.release()
        self.go.acquire()
        if self.stopped:
            raise _Stop

    def until(self, value: Value) -> Any:
        """What is taken from the tensor of a watched value; the run goes on until it passes."""
        while id(value) not in self.held:
            if self.over:
                raise BadCalibration("a calibration batch takes another path through the model than the example")
            self.go.release()
            self.ready.acquire()
            if self.error is not None:
                raise self.error
        return self.held[id(value)]

    def finish(self) -> None:
        """Let the run go on to its end."""
        while not self.over:
            self.go.release()
            self.ready.acquire()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End the run where it stands."""
        self.stopped = True
        while not self.over:
            self.go.release()
            self.ready.acquire()
        self.thread.join()


class Later:
    """Starts anew for values where too much would wait, and waits at the others."""

    def __init__(self, model: nn.Module, graph: Graph, batch: Any, takes: dict[int, tuple[Value, Take]], waiting: frozenset[int]) -> None:
        self.waiting = waiting
        self.first = Again(model, graph, batch, takes)
        self.rest = Paced(model, graph, batch, {key: take for key, take in takes.items() if key in waiting})

    def until(self, value: Value) -> Any:
        """What is taken from the tensor of a watched value."""
        return (self.rest if id(value) in self.waiting else self.first).until(value)

    def close(self) -> None:
        self.rest.close()


def runs(model: nn.Module, graph: Graph, batches: Sequence[Any], takes: dict[int, tuple[Value, Take]], waiting: float) -> list[Later]:
    """A run for every batch; they wait where from then on no activation is larger than this share of the largest one."""
    sizes = [max((math.prod(v.shape) for v in (*step.args, *step.results) if v is not None and not v.leaf), default=0) for step in graph.steps]
    limit = waiting * max(sizes, default=0)
    start = max((at + 1 for at, size in enumerate(sizes) if size > limit), default=0)
    late = frozenset(id(v) for step in graph.steps[start:] for v in (*step.args, *step.results) if v is not None)
    return [Later(model, graph, batch, takes, late) for batch in batches]


def _own_hooks(model: nn.Module) -> nn.Module:
    """The same model with a top level of its own, so that runs side by side do not meet in its hooks."""
    top = copy.copy(model)
    for name in HOOKS:
        top.__dict__[name] = OrderedDict(top.__dict__[name])
    return top


@contextmanager
def side_by_side(runs: Sequence[Any]) -> Iterator[None]:
    """All runs are ended on the way out, whatever happened."""
    try:
        yield
    finally:
        for run in runs:
            run.close()
