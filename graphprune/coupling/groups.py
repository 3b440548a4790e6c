# pyright: strict, reportPrivateUsage=false
"""Which entries must be cut together: labels become units (all or nothing), units in the same places become groups.

A field over several axes can only be cut in slices along one of them, or its tensor would not stay a box. Which one is
decided here: the axis that operations carried on (heads, when the head's positions are summed), then the outermost one
that leaves a choice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..operations.labels import Array, Joint, Partition, Reason
from ..operations.labels import rows as rows_of
from ..operations.notation import Value
from ..tables import Table
from ..tracing.graph import Graph
from ..wording import brief, counted, folded

ROWS = 40  # what fits a screen

NO_FEATURE = Reason("positions, not features: no product with a learnt weight makes them", kind="position")


Slot = tuple[str, int]  # a tensor's name and one of its axes


@dataclass(frozen=True)
class Stand:
    """Where the units of a group stand along an axis of some length: ``units[i]`` at ``positions[i]``, or at every position where that is None."""

    units: Array
    positions: Array | None
    length: int

    def dense(self) -> Array:
        """The unit at every position, -1 where none of the group is.

        >>> Stand(np.array([0, 1]), np.array([1, 3]), 4).dense()
        array([-1,  0, -1,  1])
        """
        if self.positions is None:
            return self.units
        along = np.full(self.length, -1, dtype=self.units.dtype)
        along[self.positions] = self.units
        return along


class Places(Mapping[Slot, Array]):
    """The unit of each position (or -1) by (tensor, axis), made when it is asked for: an axis that many groups share is long for each of them.

    ``stands`` holds the positions of the group alone; axes along which it stands alike share one.
    """

    def __init__(self, stands: dict[Slot, Stand]) -> None:
        self.stands = stands

    def __getitem__(self, slot: Slot) -> Array:
        return self.stands[slot].dense()

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.stands)

    def __len__(self) -> int:
        return len(self.stands)


@dataclass(frozen=True)
class Group:
    """Units that stand in the same places; ``places`` maps a (tensor, axis) to the unit of each position (or -1)."""

    index: int
    name: str
    units: Array
    places: Places

    @property
    def size(self) -> int:
        return len(self.units)

    def __str__(self) -> str:
        lines: dict[int, list[str]] = {}
        for (name, axis), units in self.places.items():
            lines.setdefault(axis, []).append(name if len(units) == self.size else f"{name} (part of {len(units)})")
        places = "\n".join(f"  axis {axis}: {folded(names, 12)}" for axis, names in sorted(lines.items()))
        return f"group {self.index} ({self.name}): {counted(self.size, 'unit')} in {counted(len(self.places), 'place')}\n{places}"

    def __repr__(self) -> str:
        return f"Group({self.index}, {self.name!r}, units={brief(self.units)}, places={len(self.places)})"


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

    def __getitem__(self, index: int) -> Group:
        return self.groups[index]

    def table(self) -> Table:
        """One row for every group; ``parameters`` counts the entries of all weights along its units (a weight between two groups counts for both)."""
        volumes = {name: math.prod(leaf.shape) for name, leaf in self.graph.leaves.items() if name in self.graph.parameters}
        rows: list[tuple[Any, ...]] = []
        for group in self:
            along = sum(volumes[n] * int(np.count_nonzero(units >= 0)) / len(units) for (n, _), units in group.places.items() if n in volumes)
            rows.append((group.index, group.name, group.size, len(group.places), round(float(along)), along / max(1, sum(volumes.values()))))
        return Table(("group", "name", "units", "places", "parameters", "share"), tuple(rows), {"share": lambda value: f"{100 * value:.1f} %"})

    def __str__(self) -> str:
        table = self.table()
        shown = Table(table.columns, table.rows if len(table) <= ROWS else tuple(sorted(table.rows, key=lambda row: -row[5])[:ROWS]), table.formats)
        hidden = [f"… and {counted(len(table) - ROWS, 'smaller group')}: groups.table()"] if len(table) > ROWS else []
        reasons: dict[str, list[str]] = {}
        for (name, axis), reason in self.locked.items():
            if not (axis > 1 and "conv" in reason.op):  # heights and widths of kernels, which nobody expects to be cut
                reasons.setdefault(f"{reason.text} ({reason.op})" if reason.op else reason.text, []).append(f"{name} axis {axis}")
        whole = [f"whole: {text}: {counted(len(axes), 'axis', 'axes')}: {folded(axes)}" for text, axes in reasons.items()]
        more = [f"… and {counted(len(whole) - 10, 'more reason')}: groups.locked"] if len(whole) > 10 else []
        return "\n".join([f"{counted(len(self), 'group')} in {counted(len(self.graph.leaves), 'tensor')}", str(shown), *hidden, *whole[:10], *more])

    def __repr__(self) -> str:
        return f"<Groups: {len(self)} groups of {sum(group.size for group in self)} units, {len(self.locked)} axes whole>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What is equal for groups of one graph with the same units, however often it is coupled (sizes and places may be equal where units are not)."""
        return self.root.tobytes(), *(group.units.tobytes() for group in self)

    def along(self, value: Value, dim: int) -> set[int]:
        """The groups whose units stand along an axis of a tensor of the run."""
        fields = [field for field in value.fields if field.shape[dim] > 1]
        return {int(i) for field in fields for i in np.unique(self.owner[self.root[field]]) if i >= 0}

    def labels_of(self, indices: Iterable[int]) -> Array:
        """All labels of some groups: what is locked by them stays whole however the rest is coupled then, which holds of one label of every unit only
        where nothing else could be chosen (heads, or what lies inside of them)."""
        return np.flatnonzero(np.isin(self.owner[self.root], np.fromiter(indices, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.groups)


def couple(
    graph: Graph,
    keep: tuple[tuple[str, int | None], ...] = (),
    locks: tuple[tuple[Array, str], ...] = (),
    free: Collection[str] = (),
    joins: Sequence[tuple[Array, Array]] = (),
) -> Groups:
    """Join what the run joined, settle fields over several axes, and collect units into groups.

    ``keep`` names (tensor, axis) pairs that stay whole, ``locks`` further labels with a reason, ``joins`` further ones that go together.
    ``free`` names kinds of reasons that do not hold: with "position", what is no feature (a token, a coordinate, an entry of a table) may go like
    any other unit; with "statistic", features over which a mean, a product or a softmax is taken that is no norm, which is then taken over those that stay.
    """
    labels = graph.labels
    parts = labels.partition()
    for left, right in joins:
        parts.union(left.ravel(), right.ravel())
    if joins:
        parts.flatten()
    reasons = list(labels.reasons)
    locks_noted = list(labels.locks)
    for name, axis in keep:
        for field in graph.leaves[name].fields:
            if axis is None or field.shape[axis] > 1:
                reasons.append(Reason("kept on request"))
                locks_noted.append((field.ravel(), len(reasons) - 1))
    for array, text in locks:
        reasons.append(Reason(text))
        locks_noted.append((array.ravel(), len(reasons) - 1))
    if len(locks_noted) > len(labels.locks):
        parts.lock(np.concatenate([array for array, _ in locks_noted[len(labels.locks) :]]))
    unsaid = _hold_conditions(parts, graph, free)
    if "position" not in free:
        _lock_positions(parts, graph)
    if labels.joints:
        _settle(parts, labels.joints)
        parts.flatten()
    root = parts.parent
    why = np.full(labels.count, -1, dtype=np.int64)
    for array, reason in reversed(unsaid):
        why[root[array]] = reason
    if "position" not in free:
        reasons.append(NO_FEATURE)
        other = ~graph.marks.features(root)
        why[root[other[root]]] = len(reasons) - 1
        parts.locked[root[other[root]]] = True
    if locks_noted:
        arrays = [array.ravel() for array, _ in reversed(locks_noted)]  # the first reason is written last
        why[root[np.concatenate(arrays)]] = np.repeat([reason for _, reason in reversed(locks_noted)], [array.size for array in arrays])
    return _collect(graph, root, parts, why, reasons)


def _hold_conditions(parts: Partition, graph: Graph, free: Collection[str]) -> list[tuple[Array, int]]:
    """Join and lock what holds unless its kind is freed (statistics over features; of positions they say nothing); returns what is locked and why."""
    parts.flatten()
    feature = graph.marks.features(parts.parent)[parts.parent]
    holding: list[tuple[Array, int]] = []
    for kind, left, right, reason in graph.labels.conditions:
        left, right = (array.ravel() for array in np.broadcast_arrays(left, right))
        asked = feature[left]
        if kind in free or not asked.any():
            continue
        if reason < 0:
            parts.union(left[asked], right[asked])
        else:
            parts.lock(left[asked])
            holding.append((left[asked], reason))
    return holding


def _lock_positions(parts: Partition, graph: Graph) -> None:
    """Lock what is no feature before anything is settled, so that a field over features and positions is cut along its features.

    A name of slices may yet become one with entries that are features.
    """
    parts.flatten()
    root = parts.parent
    other = ~graph.marks.features(root)
    for joint in graph.labels.joints:
        if joint.slices is not None:
            other[root[joint.slices]] = False
    parts.locked[root[other[root]]] = True


def _settle(parts: Partition, joints: list[Joint]) -> None:
    joints = _distinct(parts, joints)
    _name_slices(parts, joints)
    classes: dict[bytes, list[Joint]] = defaultdict(list)
    for joint in joints:
        classes[_set(joint.array).tobytes()].append(joint)
    named = [c for c in classes.values() if any(j.slices is not None for j in c)]
    rest = [c for c in classes.values() if all(j.slices is None for j in c)]
    seen: dict[int, Array] = {}
    sets = [(_set(members[0].array), members) for members in named]
    for members in named + rest:
        _decide(parts, members, _within(_set(members[0].array), sets))
        seen.update((id(joint), _follow(parts, joint)) for joint in members)
    for joint in joints:
        if not np.array_equal(parts.find(joint.array), seen[id(joint)]):  # what was settled later changed what a slice holds
            _follow(parts, joint)


def _within(every: Array, sets: list[tuple[Array, list[Joint]]]) -> list[Joint]:
    """The joints with names of slices that hold some of these labels and no others: what is asked of a part is asked of the whole."""
    inside: list[Joint] = []
    for labels, members in sets:
        if len(labels) < len(every) and every[0] <= labels[0] and labels[-1] <= every[-1] and not np.setdiff1d(labels, every, assume_unique=True).size:
            inside += [joint for joint in members if joint.slices is not None]
    return inside


def _set(array: Array) -> Array:
    """The entries, each once, in order (np.unique takes several times as long on few of them)."""
    flat = np.sort(array, axis=None)
    return flat[np.concatenate(([True], flat[1:] != flat[:-1]))]


def _distinct(parts: Partition, joints: list[Joint]) -> list[Joint]:
    """The joints as sets of labels, each once (a field is recorded anew by every operation that it passes)."""
    distinct: dict[tuple[Any, ...], Joint] = {}
    roots = parts.find(np.concatenate([a.ravel() for j in joints for a in (j.array, j.slices) if a is not None]))
    at = 0
    for joint in joints:
        array, at = np.reshape(roots[at : at + joint.array.size], joint.array.shape), at + joint.array.size
        slices = None
        if joint.slices is not None:
            slices, at = np.reshape(roots[at : at + joint.slices.size], joint.slices.shape), at + joint.slices.size
        key = (array.tobytes(), array.shape, joint.axes, joint.carried, None if slices is None else slices.tobytes())
        if key not in distinct:
            distinct[key] = Joint(array, joint.axes, slices, joint.carried)
    return list(distinct.values())


def _name_slices(parts: Partition, joints: list[Joint]) -> None:
    """Slices with the same units share a label, wherever they were named."""
    names: dict[bytes, int] = {}
    left: list[int] = []
    right: list[int] = []
    for joint in joints:
        if joint.slices is None:
            continue
        rows = np.sort(joint.rows(), axis=1)
        twice = (rows[:, 1:] == rows[:, :-1]).any(axis=1).tolist()
        for row, again, label in zip(rows, twice, joint.slices.ravel().tolist(), strict=True):
            left.append(names.setdefault((np.unique(row) if again else row).tobytes(), label))
            right.append(label)
    parts.union(np.array(left, dtype=np.int32), np.array(right, dtype=np.int32))


def _decide(parts: Partition, members: list[Joint], inside: Sequence[Joint] = ()) -> None:
    candidates: dict[bytes, tuple[tuple[int, int, int], Array]] = {}
    for number, joint in enumerate(members):
        local = parts.find(joint.array)
        for axis in range(local.ndim):
            named = joint.slices is not None and joint.axes == (axis,)
            rank = (0 if named and joint.carried else 1 if named else 2, axis, number)
            rows = rows_of(local, (axis,))
            key = np.sort(rows, axis=1).tobytes()
            if key not in candidates or rank < candidates[key][0]:
                candidates[key] = (rank, rows)
    for _, rows in sorted(candidates.values(), key=lambda c: c[0]):
        if _choices(parts, rows, [*members, *inside]) >= 2:
            parts.union(np.repeat(rows[:, 0], rows.shape[1]), rows.ravel())
            break
    else:
        for joint in members:
            parts.lock(joint.array.ravel())


def _choices(parts: Partition, rows: Array, members: list[Joint]) -> int:
    """How many unlocked sets remain when each row becomes one."""
    if _apart(parts, rows, members):
        return len(rows)
    trial = Partition(0)
    every, flat = np.unique(rows, return_inverse=True)
    flat: Array = np.reshape(flat, rows.shape).astype(np.int32)
    trial.parent = np.arange(len(every), dtype=np.int32)
    trial.locked = np.copy(parts.locked[every])
    trial.union(np.repeat(flat[:, 0], flat.shape[1]), flat.ravel())
    for joint in members:
        if joint.slices is None:
            continue
        inner = rows_of(parts.find(joint.array), joint.axes)
        inside = trial.find(np.minimum(np.searchsorted(every, inner), len(every) - 1))
        same = (inside == inside[:, :1]).all(axis=1)
        closed = parts.is_locked(joint.slices.ravel())
        trial.locked[inside[same & closed, 0]] = True
    roots = np.unique(trial.find(trial.parent))
    return int((~trial.locked[roots]).sum())


def _apart(parts: Partition, rows: Array, members: list[Joint]) -> bool:
    """Whether no label stands twice and nothing is locked: the plain case."""
    flat = np.sort(rows, axis=None)
    if np.count_nonzero(flat[1:] == flat[:-1]) or np.count_nonzero(parts.locked[flat]):
        return False
    return not any(joint.slices is not None and np.count_nonzero(parts.is_locked(joint.slices)) for joint in members)


def _follow(parts: Partition, joint: Joint) -> Array:
    """A slice whose entries are one unit goes with it; any other slice stays. What is not a box is locked. Returns what the entries are by now."""
    local = parts.find(joint.array)
    varies = sum(1 for axis in range(local.ndim) if np.count_nonzero(local != local[(slice(None),) * axis + (slice(0, 1),)]))
    if varies > 1:
        parts.lock(local.ravel())
    if joint.slices is None:
        return local
    rows = rows_of(local, joint.axes)
    flat = joint.slices.ravel()
    differ = rows != rows[:, :1]
    if not np.count_nonzero(differ):
        parts.union(flat, rows[:, 0])
        return local
    same = ~differ.any(axis=1)
    parts.union(flat[same], rows[same, 0])
    parts.lock(flat[~same])
    return local


def _collect(graph: Graph, root: Array, parts: Partition, why: Array, reasons: list[Reason]) -> Groups:
    slots, every, kinds = _slots(graph, root)
    if not slots:
        return Groups(graph, root, (), {}, np.full(len(root), -1, dtype=np.int64))
    units = np.concatenate(every)
    sizes = np.array([len(each) for each in every])
    ends = np.cumsum(sizes)
    starts = ends - sizes
    # Equal sets of slots give equal sums, for each is added up in the order of the slots.
    signature = np.bincount(units, np.repeat(np.random.default_rng(0).random(len(every)), sizes), len(root))
    closed = parts.locked[units]
    shut = np.flatnonzero(closed)
    reasoned = np.append(shut[why[units[shut]] >= 0], len(units))
    first = reasoned[np.searchsorted(reasoned, starts)]  # where the first reason of each kind stands, if any
    barred: dict[int, Reason] = {}
    for kind in np.flatnonzero(np.logical_or.reduceat(closed, starts)).tolist():
        known = first[kind] < ends[kind]
        barred[kind] = reasons[why[units[first[kind]]]] if known else Reason("its slices go with another axis")
    stands = np.zeros(len(root), dtype=bool)
    stands[units[~closed]] = True
    free = np.flatnonzero(stands)
    local, owner, members = _same_places(signature, free)
    several = [index for index, units in enumerate(members) if len(units) > 1]
    renumber = np.full(len(members) + 1, -1, dtype=np.int64)
    renumber[several] = np.arange(len(several))
    owners, inner = owner[units], local[units]
    stands = [_stands(owners[a:b], inner[a:b]) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    places: list[dict[Slot, Stand]] = [{} for _ in members]
    locked: dict[tuple[str, int], Reason] = {}
    for slot, kind in zip(slots, kinds, strict=True):
        for group, stand in stands[kind]:
            places[group][slot] = stand
        if kind in barred:
            locked[slot] = barred[kind]
    for slot, kind in zip(slots, kinds, strict=True):
        if all([renumber[group] < 0 for group, _ in stands[kind]]):
            locked.setdefault(slot, Reason("all its positions stay or go together, so that nothing would be left"))
    groups = tuple(Group(n, next(iter(places[i]))[0], members[i], Places(places[i])) for n, i in enumerate(several))
    return Groups(graph, root, groups, locked, renumber[owner])


def _slots(graph: Graph, root: Array) -> tuple[list[tuple[str, int]], list[Array], list[int]]:
    """Every (tensor, axis) that varies; the sets of labels along each kind of them, each kind once; and the kind of each slot."""
    slots = [(name, field.shape.index(field.size)) for name, leaf in graph.leaves.items() for field in leaf.fields]
    fields = [field.ravel() for leaf in graph.leaves.values() for field in leaf.fields]
    numbers: dict[bytes, int] = {}
    every: list[Array] = []
    kinds: list[int] = []
    units = root[np.concatenate(fields)] if fields else root
    start = 0
    for field in fields:
        field_units = units[start : start + len(field)]
        start += len(field)
        kinds.append(numbers.setdefault(field_units.tobytes(), len(every)))
        if kinds[-1] == len(every):
            every.append(field_units)
    return slots, every, kinds


def _stands(owner: Array, local: Array) -> list[tuple[int, Stand]]:
    """The groups along an axis, each with where its units stand."""
    least, most = int(owner.min()), int(owner.max())
    if least == most:
        return [(least, Stand(local, None, len(local)))] if least >= 0 else []
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]
    firsts = np.flatnonzero(np.diff(owner[order], prepend=-1))
    spans = zip(owner[order[firsts]].tolist(), np.split(order, firsts[1:]), strict=True)
    return [(group, Stand(local[positions], positions, len(owner))) for group, positions in spans]


def _same_places(signature: Array, free: Array) -> tuple[Array, Array, list[Array]]:
    """Units with the same signature form a group, in the order of their first unit: position within, group, members."""
    local = np.full(len(signature), -1, dtype=np.int64)
    owner = np.full(len(signature), -1, dtype=np.int32)
    signatures = signature[free]
    runs = np.flatnonzero(np.diff(signatures, prepend=np.nan) != 0)  # neighbours mostly belong together: sorting the runs is less work
    _, first, which = np.unique(signatures[runs], return_index=True, return_inverse=True)
    first, which = runs[first], np.repeat(which.ravel(), np.diff(runs, append=len(signatures)))
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    group = rank[which]
    order = np.argsort(group, kind="stable")
    counts = np.bincount(group, minlength=len(first))
    ends = np.cumsum(counts)
    owner[free] = group
    local[free[order]] = np.arange(len(free)) - np.repeat(ends - counts, counts)
    return local, owner, np.split(free[order], ends[:-1]) if len(first) else []
