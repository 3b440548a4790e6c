"""Who makes the units of a group, who sums over them, and what only passes them on: :func:`links`.

A group says which axes are cut together. Scores and repairs also need the roles: the rows of a weight that *produce* a
unit, the columns that *consume* it, the scales and statistics it *passes*; and the activation that is there when the model runs.

>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> for link in links(couple(trace(net, torch.zeros(1, 4))))[0]:
...     print(link.role, link.leaf, link.axis)
produces 0.bias 0
produces 0.weight 0
consumes 2.weight 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..operations.labels import Array
from ..operations.notation import Axes, Value, parse
from ..tracing.features import axis_names, real_axes
from ..tracing.graph import Graph
from ..tracing.node import Node
from ..tracing.trace import trace
from ..tracing.trees import tensors
from .groups import Groups, couple

__all__ = ["Link", "couple", "links", "torch", "trace"]


@dataclass(frozen=True)
class Link:
    """One place where a tensor of the model meets the units of a group.

    ``units`` gives the unit of each position of ``leaf`` along ``axis`` (-1: none of this group), ``along`` that of each position of the activation
    ``value`` along ``dim`` (a flattened map has several positions per unit). The activation is the input of a consumer and the output of the others;
    it is None where the model's own code never holds it. ``direct``: the leaf itself is used, not something computed from it (weight norm).
    """

    group: int
    role: str
    leaf: str
    axis: int
    units: Array
    op: str
    node: int
    value: Value | None
    dim: int
    along: Array
    direct: bool = True


def links(groups: Groups) -> list[list[Link]]:
    """The links of every group, in the order of the run; each (leaf, axis, role) once, at its first use."""
    finder = _Finder(groups)
    by_group: list[list[Link]] = [[] for _ in groups]
    seen = set()
    for link in finder.all():
        key = (link.group, link.role, link.leaf, link.axis)
        if key not in seen:
            seen.add(key)
            by_group[link.group].append(link)
    return by_group


class _Finder:
    def __init__(self, groups: Groups) -> None:
        self.groups, self.graph = groups, groups.graph
        self.local = np.full(len(groups.root), -1, dtype=np.int64)
        for group in groups:
            self.local[group.units] = np.arange(group.size)
        self.origin = _origins(self.graph)
        self.starts = {name: [(int(f.min()), int(f.max()), int(np.argmax(f.shape))) for f in leaf.fields] for name, leaf in self.graph.leaves.items()}

    def all(self) -> Iterator[Link]:
        for index, node in enumerate(self.graph.nodes):
            rule = node.rule
            if rule is None:
                continue
            lefts, rights = parse(rule.text)
            pairs = [(value, real_axes(axes, value.shape, rule.sizes)) for value, axes in zip(rule.operands, lefts, strict=True) if isinstance(value, Value)]
            flowing = [pair for pair in pairs if id(pair[0]) not in self.origin]
            sources = [pair for pair in pairs if id(pair[0]) in self.origin and pair[0].fields]
            if not sources or all(id(value) in self.origin for value in tensors((node.args, node.kwargs))):
                continue
            into = {name for _, axes in flowing for dim in axes for name in axis_names(dim)}
            out = {name for axes in rights for dim in axes for name in axis_names(dim)}
            for value, axes in sources:
                yield from self.links_of(index, node, value, axes, into, out, flowing, rights)

    def links_of(
        self, index: int, node: Node, weight: Value, axes: Axes, into: set[Any], out: set[Any], flowing: list[Any], rights: tuple[Any, ...]
    ) -> Iterator[Link]:
        leaf, direct = self.origin[id(weight)]
        for field in weight.fields:
            dim = next((d for d, size in enumerate(field.shape) if size > 1), None)
            if dim is None:
                continue
            names = {name for name in axis_names(axes[dim])}
            place = self.place(leaf, field)
            if not names or place is None:
                continue
            role = "passes" if names <= into and names & out else "consumes" if not names & out else "produces"
            axis, whole = place
            owners = self.groups.owner[self.groups.root[whole]]
            for group in np.unique(owners[owners >= 0]):
                units = np.where(owners == group, self.local[self.groups.root[whole]], -1)
                value, at, along = self.activation(int(group), node, role, names, flowing, rights)
                yield Link(int(group), role, leaf, axis, units, node.op.short, index, value, at, along, direct)

    def place(self, leaf: str, field: Array) -> tuple[int, Array] | None:
        """The axis of the leaf whose labels a field carries, and all labels of that axis."""
        label = int(field.flat[0])
        for array, (low, high, axis) in zip(self.graph.leaves[leaf].fields, self.starts[leaf], strict=True):
            if low <= label <= high:
                return axis, array.ravel()
        return None

    def activation(self, group: int, node: Node, role: str, names: set[Any], flowing: list[Any], rights: tuple[Any, ...]) -> tuple[Value | None, int, Array]:
        """What the Python code holds there, and the axis along which the units stand."""
        step = self.graph.steps[node.step] if node.step >= 0 else None
        values = [] if step is None else [v for v in (step.args if role == "consumes" else step.results) if v is not None and id(v) not in self.origin]
        inner = flowing if role == "consumes" else list(zip(node.outs, rights, strict=False))
        for value, axes in inner:
            at = next((d for d, dim in enumerate(axes) if set(axis_names(dim)) & names), None)
            if at is not None and any(value is other for other in values):
                return value, at, self.along(group, value, at)
        for value in values:
            for dim in reversed(range(len(value.shape))):
                along = self.along(group, value, dim)
                if (along >= 0).any():
                    return value, dim, along
        return None, -1, np.zeros(0, dtype=np.int64)

    def along(self, group: int, value: Value, dim: int) -> Array:
        """The unit of each position of a value along one of its axes; -1 where a position holds none or several."""
        units = np.full(value.shape[dim], -1, dtype=np.int64)
        for field in value.fields:
            if field.shape[dim] == 1:
                continue
            roots = self.groups.root[np.moveaxis(field, dim, 0).reshape(field.shape[dim], -1)]
            inside = (roots == roots[:, :1]).all(axis=1) & (self.groups.owner[roots[:, 0]] == group)
            units[inside] = self.local[roots[inside, 0]]
        return units


def _origins(graph: Graph) -> dict[int, tuple[str, bool]]:
    """The parameter or buffer behind each value that does not depend on the inputs, and whether it is the leaf itself (moved at most)."""
    origin = {id(leaf): (name, True) for name, leaf in graph.leaves.items()}
    for node in graph.nodes:
        operands = list(tensors((node.args, node.kwargs)))
        if not operands or any(id(value) not in origin for value in operands):
            continue
        first, direct = origin[id(operands[0])]
        for value in node.outs:
            origin[id(value)] = (first, direct and (node.is_move or node.op.keeps_zero))
    return origin
