"""Which groups are attention heads: read from the graph.

Weights that a softmax made are multiplied with values, once for every head: the heads are the units that stand along the
batch axis of that product. Nothing else of a model has this, whatever its modules are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..coupling.groups import Groups
from ..errors import NothingToPrune
from ..operations.contraction import Product
from ..operations.labels import Array
from ..tracing.graph import Graph


def heads(groups: Groups) -> set[int]:
    """The indices of the groups whose units are attention heads (or, with shared keys, the groups of heads that share them)."""
    return set().union(*(_along(groups, product, product.shared) for product in _weighing(groups.graph)))


def attended(groups: Groups) -> set[int]:
    """The groups along any axis of what attention weighs: heads, and what lies inside of one."""
    every = [groups.along(operand.value, dim) for product in _weighing(groups.graph) for operand in product.operands for dim in range(len(operand.value.shape))]
    return set().union(*every)


def _weighing(graph: Graph) -> Iterator[Product]:
    """The products of values with weights that a softmax made."""
    weighted: set[int] = set()
    for node in graph.nodes:
        if node.op.softmax:
            weighted.add(id(node.outs[0]))
        elif node.product is not None:
            if any(id(operand.value) in weighted for operand in node.product.operands):
                yield node.product
        elif any(id(value) in weighted for value in node.held) and (node.is_move or node.is_pointwise):
            weighted.add(id(node.outs[0]))


def inside(groups: Groups) -> set[int]:
    """The groups within heads: what queries are compared with keys by, and what of the values is handed on."""
    found: set[int] = set()
    for product in _comparing(groups.graph):
        found |= _along(groups, product, frozenset(name for operand in product.operands for dim in operand.summed for name in operand.axes[dim]))
    for product in _weighing(groups.graph):
        found |= {index for operand in product.operands for dim in operand.made for index in groups.along(operand.value, dim)}
    return found


def entries(groups: Groups) -> dict[int, int]:
    """How many entries a head has along the axis of each group that is within heads."""
    length: dict[int, int] = {}
    for product in _comparing(groups.graph):
        for operand in product.operands:
            for dim in operand.summed:
                length |= dict.fromkeys(groups.along(operand.value, dim), operand.value.shape[dim])
    for product in _weighing(groups.graph):
        for operand in product.operands:
            for dim in operand.made:
                length |= dict.fromkeys(groups.along(operand.value, dim), operand.value.shape[dim])
    return {index: length[index] for index in inside(groups) if index in length}


def whole_heads(graph: Graph) -> list[tuple[Array, str]]:
    """Locks for the heads themselves, so that what lies inside of them may go."""
    locks = []
    for product in _weighing(graph):
        for operand in product.operands:
            for dim in product.along(operand, product.shared):
                locks += [(field.ravel(), "heads stay: what goes is inside of them") for field in operand.value.fields if field.shape[dim] == field.size > 1]
    return locks


def _comparing(graph: Graph) -> Iterator[Product]:
    """The products of queries with keys: those whose results a softmax is taken of."""
    wanted: set[int] = set()
    for node in reversed(graph.nodes):
        if node.op.softmax:
            wanted.update(map(id, node.held))
        elif any(id(value) in wanted for value in node.outs):
            if node.product is not None:
                yield node.product
            elif node.is_move or node.is_pointwise:
                wanted.update(map(id, node.held))


def _along(groups: Groups, product: Product, names: Any) -> set[int]:
    """The groups along the axes of these names that the operands of a product have."""
    every = [groups.along(operand.value, dim) for operand in product.operands for dim in product.along(operand, names)]
    return set().union(*every)


def others(groups: Groups) -> tuple[tuple[Array, str], ...]:
    """Locks for everything that is no head; raises :class:`~graphprune.errors.NothingToPrune` when nothing is one."""
    attended = heads(groups)
    if not attended:
        raise NothingToPrune("no group of this model is made of attention heads: no softmax weighs values head by head along an axis that can be cut")
    return ((groups.labels_of(index for index in range(len(groups)) if index not in attended), "only attention heads are cut"),)
