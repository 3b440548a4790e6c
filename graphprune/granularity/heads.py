"""Which groups are attention heads: read from the graph.

Weights that a softmax made are multiplied with values, once for every head: the heads are the units that stand along the
batch axis of that product. Nothing else of a model has this, whatever its modules are called.
"""

from __future__ import annotations

import numpy as np

from ..coupling.groups import Groups
from ..errors import NothingToPrune
from ..operations.contraction import Product
from ..operations.labels import Array


def heads(groups: Groups) -> set[int]:
    """The indices of the groups whose units are attention heads (or, with shared keys, the groups of heads that share them)."""
    graph, weighted = groups.graph, set()
    found: set[int] = set()
    for node in graph.nodes:
        if node.op.softmax:
            weighted.add(id(node.outs[0]))
        elif node.product is not None:
            found |= _shared(groups, node.product, weighted)
        elif any(id(value) in weighted for value in node.held) and (node.is_move or node.is_pointwise):
            weighted.add(id(node.outs[0]))
    return found


def _shared(groups: Groups, product: Product, weighted: set[int]) -> set[int]:
    """The groups along the axes that both operands of a product with weights have, and its result."""
    if not any(id(operand.value) in weighted for operand in product.operands):
        return set()
    every = [groups.along(operand.value, dim) for operand in product.operands for dim in product.along(operand, product.shared)]
    return set().union(*every)


def others(groups: Groups) -> tuple[tuple[Array, str], ...]:
    """Locks for everything that is no head; raises :class:`~graphprune.errors.NothingToPrune` when nothing is one."""
    mine = heads(groups)
    if not mine:
        raise NothingToPrune("no group of this model is made of attention heads: no softmax weighs values head by head along an axis that can be cut")
    return tuple((np.asarray(group.units), "only attention heads are cut") for group in groups if group.index not in mine)
