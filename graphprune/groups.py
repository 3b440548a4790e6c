"""Which entries must be cut together: labels become units (all or nothing), units in the same places become groups.

A field over several axes can only be cut in slices along one of them, or its tensor would not stay a box. Which one is
decided here: the axis that operations carried on (heads, when the head's positions are summed), then the outermost one
that leaves a choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .labels import Array, Joint, Partition, Reason
from .labels import rows as rows_of
from .notation import Value
from .trace import Graph


@dataclass(frozen=True)
class Group:
    """Units that stand in the same places; ``places`` maps a (tensor, axis) to the unit of each position (or -1)."""

    index: int
    name: str
    units: Array
    places: dict[tuple[str, int], Array]

    @property
    def size(self) -> int:
        return len(self.units)


@dataclass(frozen=True)
class Groups:
    """All groups of a graph, the unit of every label, and the reason for every axis left whole."""

    graph: Graph
    root: Array
    groups: tuple[Group, ...]
    locked: dict[tuple[str, int], Reason]

    owner: Array

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def along(self, value: Value, dim: int) -> set[int]:
        """The groups whose units stand along an axis of a tensor of the run."""
        fields = [field for field in value.fields if field.shape[dim] > 1]
        return {int(i) for field in fields for i in np.unique(self.owner[self.root[field]]) if i >= 0}

    def __len__(self) -> int:
        return len(self.groups)


def couple(graph: Graph, keep: tuple[tuple[str, int | None], ...] = (), locks: tuple[tuple[Array, str], ...] = ()) -> Groups:
    """Join what the run joined, settle fields over several axes, and collect units into groups.

    ``keep`` names (tensor, axis) pairs that stay whole, ``locks`` further labels with a reason.
    """
    labels = graph.labels
    parts = labels.partition()
    reasons = list(labels.reasons)
    held = list(labels.locks)
    for name, axis in keep:
        for field in graph.leaves[name].fields:
            if axis is None or field.shape[axis] > 1:
                reasons.append(Reason("kept on request"))
                held.append((field.ravel(), len(reasons) - 1))
    for array, text in locks:
        reasons.append(Reason(text))
        held.append((array.ravel(), len(reasons) - 1))
    for array, _ in held[len(labels.locks) :]:
        parts.lock(array)
    _settle(parts, labels.joints)
    parts.flatten()
    root = parts.parent
    why = np.full(labels.count, -1, dtype=np.int64)
    for array, reason in reversed(held):
        why[root[array.ravel()]] = reason
    return _collect(graph, root, parts, why, reasons)


def _settle(parts: Partition, joints: list[Joint]) -> None:
    classes: dict[bytes, list[Joint]] = defaultdict(list)
    seen = set()
    for joint in joints:
        key = (id(joint.array), joint.axes, joint.carried)
        if key not in seen:
            seen.add(key)
            classes[np.unique(parts.find(joint.array)).tobytes()].append(joint)
    _name_slices(parts, joints)
    named = [c for c in classes.values() if any(j.slices is not None for j in c)]
    rest = [c for c in classes.values() if all(j.slices is None for j in c)]
    for members in named + rest:
        _decide(parts, members)
    for joint in joints:  # what was settled later may have changed what a slice holds
        _follow(parts, joint)


def _name_slices(parts: Partition, joints: list[Joint]) -> None:
    """Slices with the same units share a label, wherever they were named."""
    names: dict[bytes, int] = {}
    left, right = [], []
    for joint in joints:
        if joint.slices is None:
            continue
        rows = np.sort(parts.find(joint.rows()), axis=1)
        for row, label in zip(rows, joint.slices.ravel(), strict=True):
            first = names.setdefault(np.unique(row).tobytes(), int(label))
            left.append(first)
            right.append(label)
    parts.union(np.array(left, dtype=np.int32), np.array(right, dtype=np.int32))


def _decide(parts: Partition, members: list[Joint]) -> None:
    candidates: dict[tuple, tuple] = {}
    for number, joint in enumerate(members):
        for axis in range(joint.array.ndim):
            named = joint.slices is not None and joint.axes == (axis,)
            rank = (0 if named and joint.carried else 1 if named else 2, axis, number)
            key = np.sort(parts.find(rows_of(joint.array, (axis,))), axis=1).tobytes()
            candidates[key] = min(candidates.get(key, (rank, joint, axis)), (rank, joint, axis), key=lambda c: c[0])
    for _, joint, axis in sorted(candidates.values(), key=lambda c: c[0]):
        rows = parts.find(rows_of(joint.array, (axis,)))
        if _choices(parts, rows, members) >= 2:
            parts.union(np.repeat(rows[:, 0], rows.shape[1]), rows.ravel())
            break
    else:
        for joint in members:
            parts.lock(joint.array.ravel())
    for joint in members:
        _follow(parts, joint)


def _choices(parts: Partition, rows: Array, members: list[Joint]) -> int:
    """How many unlocked sets remain when each row becomes one."""
    trial = Partition(0)
    every, flat = np.unique(rows, return_inverse=True)
    flat = flat.reshape(rows.shape).astype(np.int32)
    trial.parent = np.arange(len(every), dtype=np.int32)
    trial.locked = parts.locked[every].copy()
    trial.union(np.repeat(flat[:, 0], flat.shape[1]), flat.ravel())
    for joint in members:
        if joint.slices is None:
            continue
        inner = joint.rows()
        inside = trial.find(np.searchsorted(every, parts.find(inner)).astype(np.int32).clip(0, len(every) - 1))
        same = (inside == inside[:, :1]).all(axis=1)
        closed = parts.is_locked(joint.slices.ravel())
        trial.locked[inside[same & closed, 0]] = True
    roots = np.unique(trial.find(np.arange(len(every), dtype=np.int32)))
    return int((~trial.locked[roots]).sum())


def _follow(parts: Partition, joint: Joint) -> None:
    """A slice whose entries are one unit goes with it; any other slice stays. What is not a box is locked."""
    rows = parts.find(joint.array)
    whole = [axis for axis in range(rows.ndim) if (rows == rows.take([0], axis=axis)).all()]
    if len(whole) < rows.ndim - 1:
        parts.lock(rows.ravel())
    if joint.slices is None:
        return
    rows = parts.find(joint.rows())
    same = (rows == rows[:, :1]).all(axis=1)
    flat = joint.slices.ravel()
    parts.union(flat[same], rows[same, 0])
    if (~same).any():
        parts.lock(flat[~same])


def _collect(graph: Graph, root: Array, parts: Partition, why: Array, reasons: list[Reason]) -> Groups:
    rng = np.random.default_rng(0)
    signature = np.zeros(len(root), dtype=np.int64)
    slots: dict[tuple[str, int], Array] = {}
    locked: dict[tuple[str, int], Reason] = {}
    for name, leaf in graph.leaves.items():
        for field in leaf.fields:
            axis = int(np.argmax(field.shape))
            units = root[field.ravel()]
            slots[name, axis] = units
            hashed = int(rng.integers(1, 2**62))
            np.add.at(signature, units, hashed)
            if parts.locked[units].any():
                known = why[units[parts.locked[units]]]
                known = known[known >= 0]
                locked[name, axis] = reasons[int(known[0])] if known.size else Reason("its slices go with another axis")
    real = np.unique(np.concatenate(list(slots.values()))) if slots else np.zeros(0, dtype=np.int32)
    free = real[~parts.locked[real]]
    order: dict[int, list[int]] = defaultdict(list)
    for unit in free:
        order[int(signature[unit])].append(int(unit))
    local = np.full(len(root), -1, dtype=np.int64)
    owner = np.full(len(root), -1, dtype=np.int64)
    for index, units in enumerate(order.values()):
        local[units] = np.arange(len(units))
        owner[units] = index
    places: list[dict] = [{} for _ in order]
    for slot, units in slots.items():
        mine = owner[units]
        for index in np.unique(mine[mine >= 0]):
            places[index][slot] = np.where(mine == index, local[units], -1)
    several = [i for i, units in enumerate(order.values()) if len(units) > 1]
    members = list(order.values())
    groups = tuple(Group(n, next(iter(places[i]))[0], np.array(members[i]), places[i]) for n, i in enumerate(several))
    renumber = np.full(len(members) + 1, -1, dtype=np.int64)
    renumber[several] = np.arange(len(several))
    return Groups(graph, root, groups, locked, renumber[owner])
