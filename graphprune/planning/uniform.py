"""Groups of one kind in all layers: :func:`alike`, for widths that have to be the same everywhere, as a configuration says one number for all layers.

Groups are of one kind when they stand in the same places but for the numbers of layers, and have the same size.

>>> pattern("layers.3.mlp.up.weight")
'layers.*.mlp.up.weight'
"""

from __future__ import annotations

from collections import defaultdict

from ..coupling.groups import Groups

Slot = tuple[str, int]


def pattern(name: str) -> str:
    """A name without its numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def alike(groups: Groups) -> tuple[list[frozenset[int]], list[Slot]]:
    """The groups that keep equally many units; and the axes that stay whole because an axis of their kind is locked elsewhere."""
    kinds: dict[tuple, set[int]] = defaultdict(set)
    locked = {(pattern(name), axis, groups.graph.leaves[name].shape[axis]) for name, axis in groups.locked}
    shut: list[Slot] = []
    for group in groups:
        places = {(pattern(name), axis) for name, axis in group.places}
        kinds[frozenset(places), group.size].add(group.index)
        if any((pattern(name), axis, groups.graph.leaves[name].shape[axis]) in locked and "*" in pattern(name) for name, axis in group.places):
            shut += group.places
    return [frozenset(indices) for indices in kinds.values() if len(indices) > 1], shut
