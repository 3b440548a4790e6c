"""What a run has seen, as data: :class:`Graph`."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch

from ..operations.labels import Labels
from ..operations.notation import Value
from .choices import Choice
from .features import Marks
from .members import Mixture
from .needs import Call
from .node import Node
from .sizes import Branch, Doubt, Expr
from .summary import summary
from .trees import tensors


class Step(NamedTuple):
    """One call of the Python code: its name, the values of its tensor arguments and of its results, in order, and whether any is floating."""

    name: str
    args: tuple[Value | None, ...]
    results: tuple[Value | None, ...]
    floats: bool = True


class Rerun(NamedTuple):
    """A run after the first: its calls, how many had been recorded before them, what it was given and gave, and which of the further examples it was.

    ``which`` is -1 in training mode, on the example itself.
    """

    nodes: list[Node]
    start: int
    inputs: list[Value]
    outputs: list[Value]
    which: int

    def covers(self, at: int) -> bool:
        """Whether a call, by its number over all runs, is one of these."""
        return self.start <= at <= self.start + len(self.nodes)


@dataclass(frozen=True)
class Graph:
    """What a model computes on an example: the ATen calls in order, its leaves, and the labels of every tensor.

    ``nodes`` are ATen calls, ``steps`` calls of the Python code. ``leaves`` are parameters, buffers, plain tensor attributes (by qualified name) and
    constants made in the code (``"<constant 3>"``). ``calls``, ``floats``, ``equals``, ``outcomes``, ``doubts`` and ``symbols`` say what the code does
    with sizes (:mod:`graphprune.tracing.symbols`). ``example`` holds the positional and the keyword arguments of the run.
    """

    nodes: list[Node]
    steps: list[Step]
    leaves: dict[str, Value]
    labels: Labels
    inputs: list[Value]
    outputs: list[Value]
    calls: list[Call]
    floats: list[Expr]
    equals: list[tuple[Expr, Expr]]
    outcomes: list[Branch]
    doubts: list[Doubt]
    symbols: dict[tuple[Any, ...], int]
    example: tuple[tuple[Any, ...], dict[str, Any]]
    constants: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])  # by the name of the leaf
    filled: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])  # whole numbers that no call shows being written, by the id of their value
    real: bool = False  # whether the run had values: control flow depends on them
    parameters: frozenset[str] = frozenset()  # the leaves that are parameters
    unread: list[str] = field(default_factory=list[str])  # the leaves that no run reads
    picks: dict[str, tuple[Value, int]] = field(default_factory=dict[str, tuple[Value, int]])  # the axis whose positions an integer buffer numbers
    choices: list[Choice] = field(default_factory=list[Choice])  # axes that the code chooses from, of which entries may go (experts)
    mixtures: list[Mixture] = field(default_factory=list[Mixture])  # choices that lead to modules of lists, which go by a plan of their own
    marks: Marks = field(default_factory=Marks)  # which labels learnt weights make and read
    paths: list[str] = field(default_factory=list[str])  # of the outputs, in the result
    given: dict[str, list[tuple[int | str, Value | None]]] = field(default_factory=dict[str, list[tuple[int | str, Value | None]]])  # to modules, first time
    numbers: bool = False  # whether plain numbers stand beside them there
    asked: Any = None  # what was run: example, outputs that matter, further examples
    state: frozenset[str] = frozenset()  # parts of the result that the model takes back itself in its next call
    states: frozenset[str] = frozenset()  # parts of the result whose width follows what is cut (:mod:`graphprune.tracing.states`)
    looked: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (module, line) that looked at a value
    trained: bool = False  # whether what training mode does is part of the labels
    training: list[Node] = field(default_factory=list[Node])  # the calls of a run in training mode, where that may be another one
    random_in_training: bool = False  # whether any run drew random numbers
    reruns: list[Rerun] = field(default_factory=list[Rerun])  # the further runs that came to their end, in order

    def __str__(self) -> str:
        return summary(self)

    def __repr__(self) -> str:
        return f"<Graph: {len(self.nodes)} calls, {len(self.leaves)} tensors, {self.labels.count} labels>"

    @property
    def counted(self) -> int:
        """How many calls were recorded, in all runs."""
        return max([len(self.nodes), *(rerun.start + len(rerun.nodes) for rerun in self.reruns)])

    # Costs and tables that were made for it; they go with it.
    derived: dict[Any, Any] = field(default_factory=dict[Any, Any], init=False, repr=False, compare=False)

    def to_networkx(self) -> Any:
        """The dependency graph: one node per call (with its operation, module and line), one edge per tensor."""
        networkx: Any = import_module("networkx")
        graph = networkx.DiGraph()
        for index, node in enumerate(self.nodes):
            graph.add_node(index, op=str(node.func), module=node.module, line=node.line)
            for value in tensors((node.args, node.kwargs)):
                if value.node >= 0:
                    graph.add_edge(value.node, index)
                elif value.leaf:
                    graph.add_edge(value.leaf, index)
        return graph
