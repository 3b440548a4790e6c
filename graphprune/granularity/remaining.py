"""What a model costs without some of its modules, kept up to date as they go and come back: :class:`Remaining`."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn

from ..cost import macs_by_call
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.trees import leaf_tensors
from .blocks import Modules, Removable, paths
from .liveness import Liveness


class Remaining:
    """The parameters, MACs (of calls that still reach an output) and bytes that are left, as ``costs``."""

    def __init__(self, graph: Graph, model: nn.Module, modules: Modules) -> None:
        self.modules, self.macs, self.liveness = modules, macs_by_call(graph), Liveness(graph)
        self.tensors: list[torch.Tensor] = []  # one for each name; a tensor of several names is there several times
        self.within: dict[str, list[int]] = defaultdict(list)  # by module: which of them it, or a module in it, holds
        for name, _, _, tensor in leaf_tensors(model):
            for path in paths(name.rpartition(".")[0]):
                self.within[path].append(len(self.tensors))
            self.tensors.append(tensor)
        self.names = Counter(id(tensor) for tensor in self.tensors)  # under how many names a tensor is still there
        self.covered = [0] * len(self.tensors)  # how many of the modules around a name are gone
        self.skipped: Counter[str] = Counter()  # by module: how many of what is gone take it along
        self.turned: dict[int, str] = {}  # by value: whose output it is
        macs = sum(each for each, live in zip(self.macs, self.liveness.live, strict=True) if live)
        self.costs: dict[str, float] = {"params": 0.0, "macs": macs, "size": 0.0}
        for tensor in {id(tensor): tensor for tensor in self.tensors}.values():
            self._add(tensor, 1)

    def remove(self, one: Removable) -> None:
        """A module goes, with what only it needed."""
        for part in one.skips:
            self.skipped[part.name] += 1
            if self.skipped[part.name] == 1:
                self._cover(part.name, 1)
        before, after = self._ends(one)
        if id(after) not in self.turned:
            self.turned[id(after)] = one.name
            self._count(self.liveness.turn(after, before))

    def restore(self, one: Removable) -> None:
        """A module comes back."""
        for part in one.skips:
            self.skipped[part.name] -= 1
            if not self.skipped[part.name]:
                self._cover(part.name, -1)
        _, after = self._ends(one)
        if self.turned.get(id(after)) == one.name:
            del self.turned[id(after)]
            self._count(self.liveness.back(after))

    def _count(self, changed: set[int]) -> None:
        self.costs["macs"] += sum(self.macs[index] if self.liveness.live[index] else -self.macs[index] for index in changed)

    def _ends(self, one: Removable) -> tuple[Value | None, Value]:
        """What is read instead of a module's output (None: nothing), and that output."""
        before, after = self.modules.ends(one.name) or (one.before, one.after)
        return None if one.skips[0].data[2] else before, after

    def _cover(self, path: str, step: int) -> None:
        for entry in self.within[path]:
            before, tensor = self.covered[entry], self.tensors[entry]
            self.covered[entry] = before + step
            if (before > 0) == (before + step > 0):
                continue
            self.names[id(tensor)] -= step
            if self.names[id(tensor)] == (0 if step > 0 else 1):
                self._add(tensor, -step)

    def _add(self, tensor: torch.Tensor, sign: int) -> None:
        self.costs["params"] += sign * tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        self.costs["size"] += sign * tensor.numel() * tensor.element_size()
