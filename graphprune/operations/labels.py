"""Labels: integers that say which entries of all tensors stay or go together, and what was asked of them.

A *field* gives every entry of a tensor a label. It is an int array with the tensor's number of axes and length 1
wherever the label does not vary, so batch, token and pixel axes cost nothing. A tensor may carry several fields (a
weight has one for its outputs and one for its inputs). An entry goes when any of its labels goes.

Three things can be asked: ``join`` (stay or go together), ``lock`` (never goes, with a reason) and ``marginal`` (one
label for each slice of a field that varies over several axes: "head h", when the field says "position d of head h").

>>> labels = Labels()
>>> a, b = labels.fresh(3), labels.fresh(3)
>>> labels.join(a, b[::-1])
>>> labels.partition().find(a).tolist()
[0, 1, 2]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import basename
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Fields = tuple[Array, ...]


class Coupling(Protocol):
    """What a rule asks of labels: the labels themselves, or what stands in for them and notes the questions."""

    def fresh(self, size: int) -> Array: ...

    def join(self, left: Array, right: Array) -> None: ...

    def lock(self, labels: Array, reason: int) -> None: ...

    def joint(self, array: Array) -> None: ...

    def marginal(self, array: Array, axes: tuple[int, ...], carried: bool = False) -> Array: ...


class Reason(NamedTuple):
    """Why an axis is left whole: a sentence, the operation, the module that called it, and where in the source.

    ``kind`` names what only the user's word frees (``couple(free=…)``): "position" for what is no feature, "statistic" for features over which one is
    taken. Empty: nothing does.
    ``cure``: what would free it, where that is known.
    """

    text: str
    op: str = ""
    module: str = ""
    where: tuple[str, int] | None = None
    kind: str = ""
    cure: str = ""

    @property
    def line(self) -> str:
        return f"{basename(self.where[0])}:{self.where[1]}" if self.where else ""

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.op, self.module, self.line) if part)
        said = f"{self.text} ({place})" if place else self.text
        return f"{said}; {self.cure}" if self.cure else said


@dataclass
class Joint:
    """A field over several axes, and the slices of it that an operation named: the axis and one label per slice."""

    array: Array
    axes: tuple[int, ...] = ()
    slices: Array | None = None
    carried: bool = False

    def rows(self) -> Array:
        """The labels of each slice, one row a slice."""
        return rows(self.array, self.axes)


class Partition:
    """Sets of labels that stay or go together (union-find over arrays; a set's name is its smallest label)."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count, dtype=np.int32)
        self.locked = np.zeros(count, dtype=bool)

    def find(self, labels: Array) -> Array:
        root = self.parent[labels]
        while True:
            above = self.parent[root]
            if not np.count_nonzero(above != root):  # on small arrays much cheaper than all()
                return root
            root = above

    def union(self, left: Array, right: Array) -> None:
        while left.size:
            left, right = self.find(left), self.find(right)
            differ = left != right
            count = np.count_nonzero(differ)
            if not count:
                return
            if count < differ.size:
                left, right = left[differ], right[differ]
            low, high = np.minimum(left, right), np.maximum(left, right)
            np.minimum.at(self.parent, high, low)
            closed = self.locked[high] | self.locked[low]
            if np.count_nonzero(closed):
                self.locked[low[closed]] = True
                self.locked[self.find(high)[closed]] = True

    def lock(self, labels: Array) -> None:
        self.locked[self.find(labels)] = True

    def is_locked(self, labels: Array) -> Array:
        return self.locked[self.find(labels)]

    def flatten(self) -> None:
        self.parent = self.find(np.arange(len(self.parent), dtype=np.int32))


@dataclass
class Labels:
    """Hands out labels and records what is asked of them; :meth:`partition` answers all joins and locks at once."""

    count: int = 0
    starts: list[int] = field(default_factory=list)
    pairs: list[tuple[Array, Array]] = field(default_factory=list)
    wholes: list[tuple[int, int]] = field(default_factory=list)
    locks: list[tuple[Array, int]] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    joints: list[Joint] = field(default_factory=list)
    repeated: list[tuple[int, int]] = field(default_factory=list)
    copied: list[Array] = field(default_factory=list)  # entries of copies that are apart from what was copied
    crossings: list[tuple[Array, Fields]] = field(default_factory=list)  # entries of axes that were put together, and the fields along these
    apart: bool = False  # where copies share an axis with what was copied, the copies may go, and what was copied stays
    # (kind, left, right, reason): joined, or locked with a reason that is not -1, unless the kind is freed.
    conditions: list[tuple[str, Array, Array, int]] = field(default_factory=list)
    _names: dict[bytes, int] = field(default_factory=dict)
    _cache: dict[tuple[int, tuple[int, ...]], tuple[Array, Array]] = field(default_factory=dict)
    _seen: set[tuple[int, int]] = field(default_factory=set)
    _alive: list[tuple[Array, Array]] = field(default_factory=list)
    _blocks: dict[int, tuple[int, Array]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Labels: {self.count} labels, {len(self.pairs) + len(self.wholes)} joins, {len(self.locks)} locks, {len(self.joints)} joints>"

    def fresh(self, size: int) -> Array:
        made = np.arange(self.count, self.count + size, dtype=np.int32)
        if size:
            self._blocks[id(made)] = len(self.starts), made
            self.starts.append(self.count)
        self.count += size
        return made

    def block(self, array: Array) -> int:
        """The number of the labels handed out together that ``array`` holds, all of them and in order along one axis; else -1."""
        whole = array if array.base is None else array.base
        known = self._blocks.get(id(whole))
        if known is None:
            return -1
        number, made = known
        if made is array:
            return number
        size = array.size
        return number if made is whole and made.size == size and size in array.shape and array.item(0) == made.item(0) else -1

    def is_repeated(self, array: Array) -> bool:
        """Whether a field numbers copies of one and the same thing (an expanded axis)."""
        first = int(array.flat[0])
        return any(start <= first < end for start, end in self.repeated)

    def join(self, left: Array, right: Array) -> None:
        if left is right:
            return
        key = (id(left), id(right))
        if key in self._seen:
            return
        self._seen.add(key)
        self._alive.append((left, right))  # so that their ids stay theirs
        if left.shape == right.shape:
            blocks = self.block(left), self.block(right)
            if min(blocks) >= 0:
                self.wholes.append(blocks)
                return
            self.pairs.append((left, right))
            return
        left, right = np.broadcast_arrays(left, right)
        self.pairs.append((left, right))

    def reason(self, reason: Reason) -> int:
        self.reasons.append(reason)
        return len(self.reasons) - 1

    def lock(self, labels: Array, reason: int) -> None:
        self.locks.append((labels, reason))

    def joint(self, array: Array) -> None:
        """Record that ``array`` (varying over two axes or more) must stay a box when it is cut."""
        self.joints.append(Joint(array))

    def marginal(self, array: Array, axes: tuple[int, ...], carried: bool = False) -> Array:
        """One label for each slice of ``array`` along ``axes``; slices with the same labels share theirs.

        A slice whose entries have one label keeps it, so nothing new is made for a field that does not vary inside.
        """
        key = (id(array), axes)
        if key not in self._cache:
            self._cache[key] = (array, self._slices(array, axes))
            self.joints.append(Joint(array, axes, self._cache[key][1], carried))
        elif carried:
            self.joints.append(Joint(array, axes, self._cache[key][1], carried))
        return self._cache[key][1]

    def crossed(self, before: Fields, after: Sequence[Array]) -> Fields:
        """The fields of a tensor, ``before`` its axes are put together (as ``after`` shows), such that no two of them come to lie along one axis.

        Where heads lie side by side, a position is an entry of a head: fields over an axis each become one over all of them, at the end. Counts of copies stay.
        """
        alone = [i for i, field in enumerate(before) if len(varying(field)) == len(varying(after[i])) == 1 and not self.is_repeated(field)]
        joined: list[Array] = []
        used: set[int] = set()
        for axis in dict.fromkeys(varying(after[i]) for i in alone):
            members = [i for i in alone if varying(after[i]) == axis]
            if len(members) > 1 and len({varying(before[i]) for i in members}) == len(members):
                joined.append(self.outer(tuple(before[i] for i in members)))
                used.update(members)
        return (*(field for i, field in enumerate(before) if i not in used), *joined) if joined else before

    def outer(self, fields: Fields) -> Array:
        """One field over the axes of several, which vary over axes of their own: an entry goes with that of each."""
        whole = np.broadcast_shapes(*(field.shape for field in fields))
        every = self.fresh(math.prod(whole)).reshape(whole)
        over = varying(every)
        dense = every.reshape([whole[axis] for axis in over])
        for part in fields:
            axes = varying(part)
            self.join(self.marginal(dense, tuple(over.index(axis) for axis in axes)), part.reshape([part.shape[axis] for axis in axes]))
        self.crossings.append((every, fields))
        return every

    def _slices(self, array: Array, axes: tuple[int, ...]) -> Array:
        lead = np.moveaxis(array, axes, range(len(axes)))
        rows = np.sort(lead.reshape(int(np.prod(lead.shape[: len(axes)])), -1), axis=1)
        names = rows[:, 0].copy()
        mixed = np.flatnonzero(names != rows[:, -1])
        if len(mixed):
            keys = [row.tobytes() for row in rows[mixed]]
            new = [key for key in dict.fromkeys(keys) if key not in self._names]
            self._names.update(zip(new, self.fresh(len(new)).tolist(), strict=True))
            names[mixed] = [self._names[key] for key in keys]
        return names.reshape(lead.shape[: len(axes)])

    def partition(self) -> Partition:
        parts = Partition(self.count)
        if self.wholes:
            starts = np.array(self.starts, dtype=np.int32)
            blocks = Partition(len(starts))
            blocks.union(*np.array(self.wholes, dtype=np.int32).T)
            root = blocks.find(np.arange(len(starts), dtype=np.int32))
            parts.parent += np.repeat(starts[root] - starts, np.diff(starts, append=np.int32(self.count)))
        if self.pairs:
            left, right = (np.concatenate([pair[side].ravel() for pair in self.pairs]) for side in (0, 1))
            parts.union(left, right)
            parts.flatten()
        if self.locks:
            parts.lock(np.concatenate([labels.ravel() for labels, _ in self.locks]))
        return parts


def rows(array: Array, axes: tuple[int, ...]) -> Array:
    """An array with one row for each position along ``axes``.

    >>> rows(np.arange(6).reshape(2, 3), (1,)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    if axes == (1,) and array.ndim == 2:
        return array.T
    if axes != tuple(range(len(axes))):
        array = np.moveaxis(array, axes, range(len(axes)))
    return array.reshape(math.prod(array.shape[: len(axes)]), -1)


def varying(array: Array) -> tuple[int, ...]:
    """The axes over which a field varies.

    >>> varying(np.zeros((1, 3, 1, 2), dtype=np.int32))
    (1, 3)
    """
    return tuple(axis for axis, size in enumerate(array.shape) if size > 1)


def compact(array: Array) -> Array:
    """Length 1 along every axis over which the labels are the same.

    >>> compact(np.array([[1, 1], [2, 2]])).shape
    (2, 1)
    """
    for axis in varying(array):
        first = array.take([0], axis=axis)
        if (array == first).all():
            array = first
    return array
