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
    """The groups that keep equally many units; and the axes that stay whole because none of their kind stands along that axis elsewhere, where it is locked.

    An axis of which a part is locked (the one key beside the queries) may have groups of the kind along its rest.
    """
    kinds: dict[tuple, set[int]] = defaultdict(set)
    along: dict[Slot, set[tuple]] = defaultdict(set)
    for group in groups:
        kind = frozenset((pattern(name), axis) for name, axis in group.places), group.size
        kinds[kind].add(group.index)
        for slot in group.places:
            along[slot].add(kind)
    locked: dict[tuple, list[Slot]] = defaultdict(list)
    for name, axis in groups.locked:
        locked[pattern(name), axis, groups.graph.leaves[name].shape[axis]].append((name, axis))
    shut: list[Slot] = []
    for kind, indices in kinds.items():
        for index in indices:
            slots = [slot for slot in groups[index].places if "*" in pattern(slot[0])]
            if any(kind not in along[other] for name, axis in slots for other in locked[pattern(name), axis, groups.graph.leaves[name].shape[axis]]):
                shut += groups[index].places
    return [frozenset(indices) for indices in kinds.values() if len(indices) > 1], shut
