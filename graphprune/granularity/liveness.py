"""Which calls still reach an output when modules are gone, kept up to date as modules go and come back: :class:`Liveness`.

A module that is gone is a detour: what read its output reads its input instead, or nothing. A call lives as long as
something that lives reads what it makes, so a module that goes takes along only what nobody else reads, and the work is
that of the calls which die or come back.

>>> from ..tracing.trace import trace
>>> graph = trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.zeros(1, 4))
>>> liveness = Liveness(graph)
>>> made = graph.nodes[-2].outs[0]
>>> sorted(liveness.turn(made, graph.inputs[0])), liveness.live[-1]
([0, 1], True)
"""

from __future__ import annotations

from collections import defaultdict

import torch

from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.trees import tensors

__all__ = ["Liveness", "torch"]


class Liveness:
    """``live``: for every call whether its results reach an output; ``turned``: what is read instead of a value (None: nothing)."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.reads = [tensors((node.args, node.kwargs)) for node in graph.nodes]
        self.live = [False] * len(graph.nodes)
        self.turned: dict[int, Value | None] = {}
        self._uses: dict[int, int] = defaultdict(int)  # by value: the calls, outputs and detours that read it
        self._made: dict[int, int] = defaultdict(int)  # by call: its values that are read, and not read elsewhere instead
        self._count(list(graph.outputs), 1)

    def turn(self, value: Value, other: Value | None) -> set[int]:
        """From now on ``other`` is read instead of a value, or nothing; returns the calls that die (or live) by it."""
        read = self._uses[id(value)] > 0
        self.turned[id(value)] = other
        return self._move(value, other, 1) if read else set()

    def back(self, value: Value) -> set[int]:
        """The value is read itself again; returns the calls that live (or die) by it."""
        other = self.turned.pop(id(value))
        return self._move(value, other, -1) if self._uses[id(value)] else set()

    def _move(self, value: Value, other: Value | None, step: int) -> set[int]:
        """One reader more of the other (step 1), and the value read itself no more; or the reverse (-1)."""
        gained: set[int] = set() if other is None or step < 0 else self._count([other], step)
        reads: list[Value] = []
        gained ^= self._call(value, -step, reads)
        gained ^= self._count(reads, -step)
        return gained if other is None or step > 0 else gained ^ self._count([other], step)

    def _count(self, todo: list[Value], step: int) -> set[int]:
        """One reader more (1) or less (-1) of each value; returns the calls that live or die by it."""
        changed: set[int] = set()
        while todo:
            value = todo.pop()
            before = self._uses[id(value)]
            self._uses[id(value)] = before + step
            if (before > 0) == (before + step > 0):
                continue
            if id(value) not in self.turned:
                changed |= self._call(value, step, todo)
            elif (other := self.turned[id(value)]) is not None:
                todo.append(other)
        return changed

    def _call(self, value: Value, step: int, todo: list[Value]) -> set[int]:
        """The call that makes a value which is read (1) or not (-1) by now, if it lives or dies by it; what it reads comes to ``todo``."""
        if value.node < 0:
            return set()
        before = self._made[value.node]
        self._made[value.node] = before + step
        if (before > 0) == (before + step > 0):
            return set()
        self.live[value.node] = before + step > 0
        todo += self.reads[value.node]
        return {value.node}
