"""``multiple_of="auto"``: at which widths the device is efficient, learnt by timing layers of the model.

Kernels work in blocks, so time is a staircase in the width and a width just above a step pays for the whole next one. For
every kind of product in the model the largest one is timed at widths a little above a round one; the alignment is the
smallest step whose multiples all lie on (or below) the line from one round width to the next. Timings come from, and stay
in, the table on disk (:mod:`graphprune.timing.table`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..cost import products
from ..coupling.groups import Groups
from ..coupling.lengths import Lengths
from ..tracing.node import Node
from ..tracing.trees import tensors
from .operators import PROFILERS
from .table import Table

BLOCK = 32
STEPS = (1, 2, 4, 8, 16, 32)
SLACK = 0.04
LEAST_LEVELS = 4


def staircase(seconds: Callable[[int], float], start: int) -> int:
    """The smallest of 1, 2, 4 … 32 whose multiples above ``start`` cost no more than their share of the next 32, nor more than the next wider one.

    >>> staircase(lambda width: -(-width // 16), 64), staircase(lambda width: width, 64)
    (16, 1)
    """
    low, high = seconds(start), seconds(start + BLOCK)
    for step in STEPS[:-1]:
        offered = range(step, BLOCK + step, step)
        line = all(seconds(start + more) <= (low + (high - low) * more / BLOCK) * (1 + SLACK) for more in offered)
        if line and all(seconds(start + more - step) <= seconds(start + more) * (1 + SLACK) for more in offered):
            return step
    return BLOCK


def alignments(groups: Groups, table: Table) -> Mapping[int, int]:
    """For every group the number of units its width should be a multiple of; at least four widths are left to choose."""
    lengths = Lengths(groups)
    multiples = {group.index: 1 for group in groups}
    largest: dict[tuple[Any, ...], tuple[float, Node]] = {}
    nodes = [(node, _kind(node), list(products(node, lengths))) for node in groups.graph.nodes]
    for node, kind, terms in nodes:
        if not terms:
            continue
        macs = sum(factor * math.prod(_full(lengths, form) for form in forms) for factor, forms in terms)
        if macs > largest.get(kind, (0.0, node))[0]:
            largest[kind] = macs, node
    steps = {kind: _learn(node, lengths, table) for kind, (_, node) in largest.items()}
    if table.fresh:
        table.save()
    for _, kind, terms in nodes:
        for form in {form for _, forms in terms for form in forms}:
            for index, positions in lengths.slopes[form].items():
                units = steps[kind] // math.gcd(steps[kind], max(1, round(positions)))
                multiples[index] = max(multiples[index], units)
    for group in groups:
        while multiples[group.index] > 1 and group.size // multiples[group.index] < LEAST_LEVELS:
            multiples[group.index] //= 2
    return multiples


def _kind(node: Node) -> tuple[Any, ...]:
    """Products with a kernel of one entry run as plain ones; where each channel has its own, as something else again."""
    weight = node.product.weight if node.product is not None else None
    if weight is None or not weight.taps:
        return (node.name,)
    return node.name, max(weight.value.shape[dim] for dim in weight.taps) > 1, all(weight.value.shape[dim] == 1 for dim in weight.summed)


def _full(lengths: Lengths, form: int) -> int:
    sizes = lengths.groups.groups
    return round(lengths.constant[form] + sum(slope * sizes[index].size for index, slope in lengths.slopes[form].items())) or 1


def _learn(node: Node, lengths: Lengths, table: Table) -> int:
    values = list(tensors((node.args, node.kwargs)))
    axes = [[lengths.form(value, dim) for dim in range(len(value.shape))] for value in values]
    forms = {form for axis in axes for _, form in axis if form}
    best = 1
    for form in forms:
        start = _full(lengths, form) // 2 // BLOCK * BLOCK
        if start < BLOCK:
            continue
        full = {other: _full(lengths, other) for other in forms} | {0: 1}

        def shapes(width: int, form: int = form, full: dict[Any, Any] = full) -> list[tuple[int, ...]]:
            now = full | {form: width}
            return [tuple(factor * now[f] for factor, f in axis) for axis in axes]

        if table.runtime in PROFILERS:  # one session for all
            table.fill([(node, shapes(start + more)) for more in range(BLOCK + 1)])
        best = max(best, staircase(lambda width, shapes=shapes: table.seconds(node, shapes(width)), start))
    return best
