"""Which groups are attention heads: read from the graph.

Weights that a softmax made are multiplied with values, once for every head: the heads are the units that stand along the
batch axis of that product. Nothing else of a model has this, whatever its modules are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..coupling.groups import Groups
from ..errors import NothingToPrune
from ..operations.contraction import Product
from ..operations.labels import Array
from ..tracing.trace import Graph


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


def _along(groups: Groups, product: Product, names: Any) -> set[int]:
    """The groups along the axes of these names that the operands of a product have."""
    every = [groups.along(operand.value, dim) for operand in product.operands for dim in product.along(operand, names)]
    return set().union(*every)


def others(groups: Groups) -> tuple[tuple[Array, str], ...]:
    """Locks for everything that is no head; raises :class:`~graphprune.errors.NothingToPrune` when nothing is one."""
    mine = heads(groups)
    if not mine:
        raise NothingToPrune("no group of this model is made of attention heads: no softmax weighs values head by head along an axis that can be cut")
    return tuple((np.asarray(group.units), "only attention heads are cut") for group in groups if group.index not in mine)
