"""Which labels are features: entries that learnt weights make, so that a product with one fewer of them is still the same product.

A run carries labels along every axis: of channels and heads, and just as well of positions, tokens, coordinates, table entries and the samples of a
remembered batch. Only the first kind may go unless the user asks for the other. They are told apart by what happens to them in products:

- *made*: an axis of a weight that a product keeps and its other operand lacks (the rows of a layer, the filters of a convolution, the width of an embedding);
- *spread*: an axis of a weight that broadcasting, or a product of two weights, gives to the result: of the kind of whoever reads it;
- *read*: an axis over which a product with a weight sums.

What is made is a feature; what is spread is one if it is read. The rows of a table, tokens that are put beside others, counts and coordinates are neither.

What neither makes (a mean over tokens, attention over positions) does not count as reading: it would do the same for any number of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ..operations.labels import Array, Labels
from ..operations.notation import Axes, Expr, Value, factors, parse
from .node import Node

WEIGHT, TABLE = "weight", "table"  # what depends on parameters alone; what depends on no input and on no parameter
# Calls that put a layer's weight (their second operand) to work on what they are given, even if that is a weight, too: the result is an activation.
LAYERS = frozenset(("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))


@dataclass
class Marks:
    """Labels by what products do to them; arrays of labels, in the order of the run."""

    made: list[Array] = field(default_factory=list)
    spread: list[Array] = field(default_factory=list)
    read: list[Array] = field(default_factory=list)

    def with_made(self, arrays: list[Array]) -> Marks:
        """These labels are made as well."""
        return Marks([*self.made, *arrays], self.spread, self.read) if arrays else self

    def with_crossed(self, labels: Labels) -> Marks:
        """Entries of axes that were put together are made where what lies along one of these is, or belongs to slices that are."""
        if not labels.crossings:
            return self
        root = labels.partition().parent
        feature = self.features(root)
        slices = [joint.slices.ravel() for joint in labels.joints if joint.slices is not None and feature[root[joint.array.flat[0]]]]
        named = np.isin(root, root[np.concatenate(slices)]) if slices else np.zeros(len(root), dtype=bool)
        made: list[Array] = []
        for both, parts in labels.crossings:
            if any((feature | named)[root[part]].any() for part in parts):
                made.append(both)
                feature[root[both]] = True
        return self.with_made(made)

    def features(self, root: Array) -> Array:
        """Whether each label, by the name of its set, is a feature: boolean, (labels,)."""
        made, spread, read = (_among(root, arrays) for arrays in (self.made, self.spread, self.read))
        return made | (spread & read)


def _among(root: Array, arrays: Sequence[Array]) -> Array:
    found = np.zeros(len(root), dtype=bool)
    if arrays:
        found[root[np.concatenate([array.ravel() for array in arrays])]] = True
    return found


def real_axes(axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Axes:
    """The axes without factors of length 1 (a depthwise convolution makes one output per input)."""
    return _real_axes(axes, shape, tuple(sizes.items()))


@lru_cache(maxsize=4096)  # layers of a network repeat each other
def _real_axes(axes: Axes, shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...]) -> Axes:
    lengths = factors(axes, shape, dict(sizes))[1]
    return tuple(tuple(name for name in dim if name == "_" or lengths[name.strip("[]")] > 1) for dim in axes)


@lru_cache(maxsize=4096)
def axis_names(dim: tuple[str, ...]) -> tuple[str, ...]:
    """The names of an axis that may be cut."""
    return tuple([name.strip("[]") for name in dim if name[0] not in "_1"])


@lru_cache(maxsize=4096)
def _names(tensors: tuple[Axes, ...]) -> frozenset[str]:
    return frozenset(name for axes in tensors for dim in axes for name in axis_names(dim))


def marks(nodes: Iterable[Node], steps: Sequence[Any], leaves: Mapping[str, Value], parameters: frozenset[str]) -> Marks:
    """What the calls of a run make, spread and read; ``parameters`` names the leaves that are learnt."""
    reader = _Reader(steps)
    for name, leaf in leaves.items():
        reader.kinds[id(leaf)] = WEIGHT if name in parameters else TABLE
    for node in nodes:
        reader.see(node)
    return reader.marks


@dataclass(frozen=True)
class _Operand:
    """One tensor of a call: its axes as the rule names them, the names that may be cut, and what kind of tensor it is."""

    value: Value
    axes: Axes
    names: frozenset[str]
    kind: str | None

    def alone(self, names: frozenset[str], operands: Iterable[_Operand]) -> frozenset[str]:
        """Those of some names that it has and no other of the operands."""
        return self.names & names - frozenset().union(*(other.names for other in operands if other is not self))


class _Reader:
    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps, self.marks = steps, Marks()
        self.kinds: dict[int, str] = {}  # by the id of a value; an activation has none
        self.broadcast: set[int] = set()  # the first label of every field that was spread

    def see(self, node: Node) -> None:
        layer = node.op.layer or (node.step >= 0 and self.steps[node.step].name in LAYERS)
        kinds = {self.kinds.get(id(value)) for value in node.held}
        result = WEIGHT if kinds and None not in kinds and WEIGHT in kinds else TABLE if None not in kinds else None
        rule = node.rule if WEIGHT in kinds or (layer and kinds) else None
        if rule is not None:
            result = self.used(node, rule, layer, result)
        if result:
            for value in node.outs:
                self.kinds[id(value)] = result

    def used(self, node: Node, rule: Expr, layer: bool, result: str | None) -> str | None:
        """Note what a call does to the axes of its weights; returns what kind its result is."""
        lefts, rights = parse(rule.text)
        out = _names(rights)
        operands = [self.operand(value, axes, rule) for value, axes in zip(rule.operands, lefts, strict=True) if isinstance(value, Value)]
        if node.op.table or node.op.picks:
            if operands[0].kind == WEIGHT:
                self.note(self.marks.made, operands[0], out)
            return None if node.op.table else result
        shared = Counter(name for one in operands for name in one.names - out)
        summed = frozenset(name for name, count in shared.items() if count > 1)
        if summed or node.op.layer:
            factors = operands[:2] if node.op.layer else [one for one in operands if one.names & summed]
            self.product(factors, self.operand(node.outs[0], rights[0], rule), summed, layer)
            return None if layer else result
        if result is None:
            for one in operands:
                if one.kind == WEIGHT:
                    self.note(self.marks.spread, one, one.alone(out, operands))
        return result

    def operand(self, value: Value, axes: Axes, rule: Expr) -> _Operand:
        axes = real_axes(axes, value.shape, rule.sizes)
        return _Operand(value, axes, _names((axes,)), self.kinds.get(id(value)))

    def product(self, factors: list[_Operand], out: _Operand, summed: frozenset[str], layer: bool) -> None:
        """Note the axes that a product makes, spreads and reads."""
        learnt = [one for one in factors if one.kind == WEIGHT]
        weight = factors[-1] if layer else learnt[0] if len(learnt) == 1 else None
        for one in factors:
            fresh = one.alone(out.names, factors)
            if one is weight:
                self.note(self.marks.read, one, summed)
                if one.kind == WEIGHT or (one.kind is None and self.comes_spread(one, fresh)):
                    self.note(self.marks.made, one, fresh)
                    self.note(self.marks.made, out, fresh)
            elif one.kind == WEIGHT:
                self.note(self.marks.read, one, summed)
                self.note(self.marks.spread, one, summed if layer else summed | fresh)

    def note(self, arrays: list[Array], operand: _Operand, names: frozenset[str]) -> None:
        for labels in self.fields(operand, names):
            arrays.append(labels)
            if arrays is self.marks.spread:
                self.broadcast.add(int(labels.flat[0]))

    def comes_spread(self, operand: _Operand, names: frozenset[str]) -> bool:
        """Whether these axes are those of a weight, by which something was multiplied (a kernel modulated for each sample)."""
        fields = list(self.fields(operand, names))
        return bool(fields) and all(int(labels.flat[0]) in self.broadcast for labels in fields)

    @staticmethod
    def fields(operand: _Operand, names: frozenset[str]) -> Iterator[Array]:
        """The labels of an operand that vary along any of the axes."""
        for labels in operand.value.fields:
            if any(n > 1 and names.intersection(axis_names(dim)) for n, dim in zip(labels.shape, operand.axes, strict=True)):
                yield labels
