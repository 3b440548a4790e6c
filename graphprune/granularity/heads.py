"""Which groups are attention heads: read from the graph.

Weights that a softmax made are multiplied with values, once for every head: the heads are the units that stand along the
batch axis of that product. Nothing else of a model has this, whatever its modules are called.
"""

from __future__ import annotations

import numpy as np

from ..coupling.groups import Groups
from ..errors import NothingToPrune
from ..operations.labels import Array
from ..operations.moves import MOVES
from ..operations.notation import Value
from ..tracing.trace import is_pointwise
from ..tracing.trees import tensors

SOFTMAX = frozenset(("_softmax", "_safe_softmax", "softmax"))
PRODUCTS = {"bmm": (0, 1), "baddbmm": (1, 2)}


def heads(groups: Groups) -> set[int]:
    """The indices of the groups whose units are attention heads (or, with shared keys, the groups of heads that share them)."""
    graph, weighted = groups.graph, set()
    found: set[int] = set()
    for node in graph.nodes:
        name = node.func._schema.name.rpartition("::")[2]
        given = list(tensors((node.args, node.kwargs)))
        if name in SOFTMAX:
            weighted.add(id(node.outs[0]))
        elif name in PRODUCTS and any(id(node.args[at]) in weighted for at in PRODUCTS[name]):
            found |= _along(groups, node.args[PRODUCTS[name][0]]) | _along(groups, node.args[PRODUCTS[name][1]])
        elif any(id(value) in weighted for value in given) and (name in MOVES or name in ("expand", "native_dropout") or is_pointwise(node.func, name)):
            weighted.add(id(node.outs[0]))
    return found


def _along(groups: Groups, value: Value) -> set[int]:
    return groups.along(value, 0)


def others(groups: Groups) -> tuple[tuple[Array, str], ...]:
    """Locks for everything that is no head; raises :class:`~graphprune.errors.NothingToPrune` when nothing is one."""
    mine = heads(groups)
    if not mine:
        raise NothingToPrune("no group of this model is made of attention heads: no softmax weighs values head by head along an axis that can be cut")
    return tuple((np.asarray(group.units), "only attention heads are cut") for group in groups if group.index not in mine)
