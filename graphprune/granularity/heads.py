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
from ..operations.labels import Array, varying
from ..operations.notation import Value
from ..tracing.graph import Graph


def heads(groups: Groups) -> set[int]:
    """The indices of the groups whose units are attention heads (or, with shared keys, the groups of heads that share them)."""
    indices: set[int] = set(of_one_key(groups))
    for product in _weighing(groups.graph):
        for operand in product.operands:
            for dim in product.along(operand, product.shared):
                for field in operand.value.fields:
                    indices |= _whole_rows(groups, field, dim) if field.shape[dim] > 1 else set()
    return indices


def of_one_key(groups: Groups) -> set[int]:
    """Heads that share one key without copies of it: one product for each sample, in which heads lie on the axis of positions, each at all of them."""
    indices: set[int] = set()
    for product in _weighing(groups.graph):
        for operand in product.operands if product.shared else ():
            for dim in operand.made:
                for field in operand.value.fields:
                    if field.shape[dim] > 1 and not _distinct(groups, field, dim):
                        indices |= _whole_rows(groups, field, dim)
    return indices


def _distinct(groups: Groups, field: Array, dim: int) -> bool:
    """Whether every position of an axis has a unit of its own."""
    firsts = groups.root[np.moveaxis(field, dim, 0)].reshape(field.shape[dim], -1)[:, 0]
    return len(np.unique(firsts)) == len(firsts)


def _whole_rows(groups: Groups, field: Array, dim: int) -> set[int]:
    """The groups along an axis of which every position belongs to one unit, whatever lies along the other axes of the field."""
    units = groups.root[np.moveaxis(field, dim, 0)].reshape(field.shape[dim], -1)
    owners = groups.owner[units]
    inside = {int(index) for index in owners[(units != units[:, :1]).any(axis=1)].ravel()}
    return {int(index) for index in np.unique(owners)} - inside - {-1}


def whole_insides(graph: Graph) -> list[tuple[Array, str]]:
    """Locks for what lies inside of heads, so that heads themselves may go."""
    locks = []
    for product in _comparing(graph):
        locks += [lock for operand in product.operands for dim in operand.summed for lock in _inside_of(graph, operand.value, dim)]
    for product in _weighing(graph):
        locks += [lock for operand in product.operands for dim in operand.made for lock in _inside_of(graph, operand.value, dim)]
    return locks


def _inside_of(graph: Graph, value: Value, dim: int) -> list[tuple[Array, str]]:
    """Locks for the positions of an axis in fields that run over others as well."""
    locks = []
    for field in value.fields:
        over = varying(field)
        if field.shape[dim] > 1 and len(over) > 1:
            dense = field.reshape([field.shape[axis] for axis in over])
            locks.append((graph.labels.marginal(dense, (over.index(dim),)).ravel(), "what is inside of heads stays: heads go"))
    return locks


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
        elif any(id(value) in weighted and (node.is_move or value.shape == node.outs[0].shape) for value in node.held) and (node.is_move or node.is_pointwise):
            weighted.add(id(node.outs[0]))  # what is spread over the features of something else is a gate of it, and no longer a weight


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
    """The products of queries with keys: those whose results a softmax is taken of (with learnt weights, it is a router or a classifier)."""
    wanted: set[int] = set()
    for node in reversed(graph.nodes):
        if node.op.softmax:
            wanted.update(map(id, node.held))
        elif any(id(value) in wanted for value in node.outs):
            if node.product is not None:
                if not any(operand.value.zero for operand in node.product.operands):
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
        raise NothingToPrune(f"no group of this model is made of attention heads: {_held(groups)}")
    return ((groups.labels_of(index for index in range(len(groups)) if index not in attended), "only attention heads are cut"),)


def _held(groups: Groups) -> str:
    """What keeps heads whole: the first thing that was asked of their axis."""
    products = list(_weighing(groups.graph))
    places = [(field, dim) for p in products for operand in p.operands for dim in p.along(operand, p.shared) for field in operand.value.fields]
    heads_of = [(field.ravel(), field.shape[dim]) for field, dim in places if field.shape[dim] > 1]
    if not heads_of:
        return "no softmax weighs values head by head"
    labels, lengths = groups.graph.labels, {length for _, length in heads_of}
    along = np.unique(groups.root[np.concatenate([array for array, _ in heads_of])])
    named = [j.slices.ravel() for j in labels.joints if j.slices is not None and j.slices.size in lengths and groups.root[j.array.flat[0]] in along]
    along = np.union1d(along, groups.root[np.concatenate(named)]) if named else along
    for array, reason in labels.locks:
        if np.isin(groups.root[array], along).any():
            return f"they stay whole: {labels.reasons[reason]}"
    return "no softmax weighs values head by head along an axis that can be cut"
