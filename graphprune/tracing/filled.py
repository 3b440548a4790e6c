"""Tensors without values that a run left behind where nobody could look: :class:`LeftBehind` gives them the values that a run of the model would have left.

What code fills outside of the model is put back where it is known (:mod:`graphprune.tracing.surroundings`). A queue, a generator, an attribute of a library's
own module is not: code that keeps a tensor there, once, would find one without values in every later call of the user's model. So what of a run is still
alive when the run is gone is computed from the recorded calls, and exchanged in its place.

>>> import queue
>>> from torch import nn
>>> from .trace import trace
>>> kept = queue.Queue()
>>> class Keeps(nn.Linear):
...     def forward(self, x):
...         if kept.empty():
...             kept.put(x.new_ones(1) * 2)
...         return super().forward(x) * kept.queue[0]
>>> _ = trace(Keeps(2, 2), torch.zeros(1, 2))
>>> kept.queue[0]
tensor([2.])
"""

from __future__ import annotations

import gc
import traceback
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils import swap_tensors

from ..operations.notation import Value
from .node import Node
from .record import Recorder
from .trees import leaf_tensors, replace, tensors


class LeftBehind:
    """The results without values of a run, held by nobody here."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.made: list[tuple[weakref.ref[torch.Tensor], Value]] = []

    def note(self, recorder: Recorder) -> None:
        """The results of a run that is over."""
        self.recorder = recorder
        known = recorder.values
        self.made = [(weakref.ref(tensor), known[id(tensor)]) for tensor in recorder.alive if tensor.is_meta and not known[id(tensor)].leaf]

    def fill(self, model: nn.Module, example: Any) -> None:
        """Give those that are still alive, now that the run is gone, their values; ``example`` is what the first run was given."""
        if self.recorder is not None and any(ref() is not None for ref, _ in self.made):
            gc.collect()  # a copy of the model may lie in a circle of references
        alive = [(tensor, value) for ref, value in self.made if (tensor := ref()) is not None]
        self.made = []
        if alive and self.recorder is not None:
            values = _Values(self.recorder, model, example)
            for tensor, value in alive:
                made = values.of(value)
                if made is not None:
                    with suppress(RuntimeError):  # it has views, is of another class, or is referred to weakly: then it stays what it was
                        swap_tensors(tensor, made.clone())
        self.recorder = None


def forget_frames(error: BaseException) -> None:
    """Let go of what the frames hold through which an error came."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


class _Values:
    """What recorded calls give with the values of a model and of an example."""

    def __init__(self, recorder: Recorder, model: nn.Module, example: Any) -> None:
        nodes = [*recorder.nodes, *recorder.extra]
        self.makers: dict[int, tuple[Node, int]] = {id(value): (node, place) for node in nodes for place, value in enumerate(node.outs)}
        self.leaves = {name: tensor.detach() for name, _, _, tensor in leaf_tensors(model)} | recorder.constants
        self.leaves |= {f"<input {place}>": tensor for place, tensor in enumerate(tensors(example, torch.Tensor))}
        self.known: dict[int, torch.Tensor] = {}

    def of(self, value: Value) -> torch.Tensor | None:
        """What a value is; None where the calls cannot be made by themselves, outside of a run: what was left is then no worse than it was."""
        try:
            with torch.no_grad():
                return self._computed(value)
        except Exception:
            return None

    def _computed(self, value: Value) -> torch.Tensor:
        todo = [value]
        while todo:
            last = todo[-1]
            node, _ = self.makers.get(id(last), (None, 0))
            missing = [] if node is None else [each for each in node.held if id(each) not in self.known]
            if id(last) not in self.known and not missing:
                self.add(last, node)
            todo = [*todo, *missing] if missing else todo[:-1]
        return self.known[id(value)]

    def add(self, value: Value, node: Node | None) -> None:
        if node is None:
            self.known[id(value)] = self.leaves[value.leaf].clone()
            return
        copied = lambda each: self.known[id(each)].clone()  # noqa: E731 (it may be written to)
        result = node.func(*replace(node.args, copied), **replace(node.kwargs, copied))
        for out, tensor in zip(node.outs, tensors(result, torch.Tensor), strict=True):
            self.known[id(out)] = tensor
