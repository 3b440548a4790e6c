"""Low-rank updates: two thin layers beside a whole one, which read what it reads and whose result is added to its own.

What lies between the two is no width of the network but the rank of a change to that layer (an adapter). Whoever made the layers wrote the rank down, with a
scale that goes with it, where no run reads it: to merge the change into the layer, to store it, to add it to another copy. So it stays whole, unless the
user frees it: ``Widths(also=("ranks",))``, ``couple(graph, free=("rank",))``.

A change that is added to the weight itself (``w + b @ a``) is one as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..operations.contraction import Operand, Product
from ..operations.labels import Array, Labels, Reason
from ..operations.notation import Value
from .node import Node


class _Step(NamedTuple):
    """The last step on a linear way: from which value, and over which labels it sums where it is a product with a weight."""

    before: int
    summed: tuple[Array, ...] | None = None


def hold_ranks(labels: Labels, nodes: Iterable[Node], parameters: Iterable[Value]) -> None:
    """Ask of the labels, on condition, that the rank of every low-rank update stays whole."""
    lines = _Lines(parameters)
    for node in nodes:
        for inner in lines.see(node):
            reason = labels.reason(Reason("the rank of an update beside a whole layer", node.op.short, node.module, node.where, "rank"))
            labels.conditions.extend(("rank", field, field, reason) for field in inner)


class _Lines:
    """Follows linear ways through a run; ``weights`` holds the ids of what depends on parameters alone."""

    def __init__(self, parameters: Iterable[Value]) -> None:
        self.weights = {id(value) for value in parameters}
        self.steps: dict[int, _Step] = {}
        self.made: dict[int, tuple[Array, ...]] = {}  # weights that are products of two others, and over what these are summed

    def see(self, node: Node) -> list[tuple[Array, ...]]:
        """Follow one call; returns what lies inside of the updates that it adds to something whole."""
        flowing = [value for value in node.held if id(value) not in self.weights and value.shape]
        if node.held and not flowing:
            self.weights.update(map(id, node.outs))
        if node.product is not None:
            self.multiplied(node, node.product)
            whole = node.bias
            return self.beside(whole, node.outs[0]) if whole is not None and len(whole.shape) == len(node.outs[0].shape) else []
        if node.op.arithmetic in ("add", "sub"):
            return self.added(node)
        if len(node.outs) == 1 and (node.is_move or node.op.arithmetic in ("mul", "div") or node.op.keeps_zero):
            sources = flowing or node.held
            if len({id(value) for value in sources}) == 1 and node.args and node.args[0] is sources[0]:
                self.passed(node, sources[0])
        return []

    def passed(self, node: Node, value: Value) -> None:
        self.steps[id(node.outs[0])] = _Step(id(value))
        if id(value) in self.made:
            self.made[id(node.outs[0])] = self.made[id(value)]

    def multiplied(self, node: Node, product: Product) -> None:
        flowing = [operand for operand in product.operands if id(operand.value) not in self.weights]
        if not flowing:
            self.made[id(node.outs[0])] = _summed(product.input)
        elif len(flowing) == 1:
            self.steps[id(node.outs[0])] = _Step(id(flowing[0].value), _summed(flowing[0]))

    def added(self, node: Node) -> list[tuple[Array, ...]]:
        terms = [value for value in node.args[:2] if isinstance(value, Value)]
        if len(terms) == 1:
            self.passed(node, terms[0])
        if len(terms) < 2:
            return []
        for whole, update in (terms, terms[::-1]):
            if self.update(whole, update):
                held = self.beside(whole, update)
                self.passed(node, whole)
                return held
        return []

    def beside(self, whole: Value, update: Value) -> list[tuple[Array, ...]]:
        """What lies inside of an update to something whole, where it is thin."""
        inner = self.update(whole, update)
        widths = [max(field.shape) for value in (whole, update) for field in value.fields]
        return [inner] if inner and max(field.size for field in inner) <= min(widths, default=0) else []

    def update(self, whole: Value, update: Value) -> tuple[Array, ...]:
        """What lies inside of an update to something whole, where the second is one to the first."""
        if id(whole) in self.weights:
            return self.made.get(id(update), ()) if id(whole) not in self.made else ()
        sources, _ = self.sources(whole)
        others, inner = self.sources(update)
        if sources[0] & others[1]:  # the second layer reads the whole one's result: a residual branch
            return ()
        return inner if sources[1] & others[2] else ()

    def sources(self, value: Value) -> tuple[list[set[int]], tuple[Array, ...]]:
        """The values that lie behind one by no, one and two products, and over what the last product sums."""
        behind: list[set[int]] = [{id(value)}, set(), set()]
        at, products, inner = id(value), 0, ()
        while at in self.steps:
            at, summed = self.steps[at]
            if summed is not None:
                inner = inner if products else summed
                products += 1
            if products > 2:
                break
            behind[products].add(at)
        return behind, inner


def _summed(operand: Operand) -> tuple[Array, ...]:
    return tuple(field for field in operand.value.fields if any(field.shape[dim] > 1 for dim in operand.summed))
