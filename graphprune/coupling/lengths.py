"""The length of every axis as a function of how many units each group keeps.

An axis is a row of positions, each belonging to a unit or to none, so its length is a constant plus, for every group,
(positions per unit) x (kept units). Where all units of a group have equally many positions the width alone decides;
otherwise the length depends on which units stay, and :meth:`Lengths.of` counts them exactly. Where units stay in a fixed
order, the best of a group first, widths decide again: :class:`Prefixes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..operations.labels import Array
from ..operations.notation import Value
from .groups import Groups


@dataclass(frozen=True)
class Linear:
    """Lengths that are linear in the widths, as a sparse matrix: entry i adds ``slope[i]`` x (width of ``group[i]``) to form ``form[i]``.

    ``constant``: (forms,); the entries are sorted by form.

    >>> Linear(np.array([1.0, 2.0]), np.array([1, 1]), np.array([0, 1]), np.array([3.0, 1.0]))(np.array([[2.0, 5.0]]))
    array([[ 1., 13.]])
    """

    constant: Array
    form: Array
    group: Array
    slope: Array

    def __call__(self, widths: Array) -> Array:
        """(rows, forms) for widths (rows, groups)."""
        return self.summed(widths[:, self.group] * self.slope)

    def summed(self, values: Array) -> Array:
        """(rows, forms): the constants and the values of the entries (rows, entries)."""
        lengths = np.repeat(self.constant[None], len(values), axis=0)
        if len(self.form):
            starts = np.flatnonzero(np.diff(self.form, prepend=-1))
            lengths[:, self.form[starts]] += np.add.reduceat(values, starts, axis=1)
        return lengths


@dataclass
class Lengths:
    """Distinct lengths ("forms"), numbered; form 0 is the constant 1.

    ``constant``: (forms,), ``slopes``: for each form the positions per unit of its groups, ``uneven``: forms whose exact
    length needs to know which units stay, as (group, positions of each unit) pairs; ``joint``: forms of axes on which several
    groups meet position by position, as unit numbers of each position (positions, fields), -1 where the position stays.
    """

    groups: Groups
    constant: list[int] = field(default_factory=lambda: [1])
    slopes: list[dict[int, float]] = field(default_factory=lambda: [{}])
    uneven: dict[int, list[tuple[int, Array]]] = field(default_factory=dict)
    joint: dict[int, Array] = field(default_factory=dict)
    _known: dict[Any, Any] = field(default_factory=dict)
    _linear: Linear | None = None

    def __post_init__(self) -> None:
        groups = self.groups
        self.starts = np.cumsum([0, *(group.size for group in groups)])
        self.unit = np.full(len(groups.root), -1, dtype=np.int64)  # of every set of labels, numbered over all groups
        for group in groups:
            self.unit[group.units] = np.arange(group.size) + self.starts[group.index]
        self.group = np.repeat(np.arange(len(groups)), [group.size for group in groups])

    def form(self, value: Value, dim: int) -> tuple[int, int]:
        """The axis as (factor, form): its length is factor x form."""
        fields = [f for f in value.fields if f.shape[dim] > 1]
        if not fields:
            return value.shape[dim], 0
        key = tuple((id(f), dim) for f in fields)
        if key not in self._known:
            self._known[key] = (self._find([self._column(f, dim) for f in fields], value.shape[dim]), fields)
        return self._known[key][0]

    def _column(self, array: Array, dim: int) -> Array:
        """The unit of each position, -1 where it stays; -2 where it lasts as long as any of several units."""
        units = self.unit[self.groups.root[np.moveaxis(array, dim, 0).reshape(array.shape[dim], -1)]]
        same = (units == units[:, :1]).all(axis=1)
        # A slice over several units contains a whole group or a locked label (see groups.py): it always stays.
        return np.where(same, units[:, 0], -1)

    def _find(self, columns: list[Array], size: int) -> tuple[int, int]:
        columns = [c for i, c in enumerate(columns) if (c >= 0).any() and not any(np.array_equal(c, o) for o in columns[:i])]
        if not columns:
            return size, 0
        table = np.stack(columns, axis=1)
        clash = ((table >= 0).sum(axis=1) > 1).any()
        units = table.max(axis=1)
        key = (table.tobytes() if clash else np.sort(units).tobytes(), size)
        if key not in self._known:
            self._known[key] = ((1, self._joint(table) if clash else self._plain(units)), None)
        return self._known[key][0]

    def _plain(self, units: Array) -> int:
        free, counts = np.unique(units[units >= 0], return_counts=True)
        indices, firsts = np.unique(self.group[free], return_index=True)  # units are numbered group by group
        number, slopes, uneven = len(self.constant), {}, []
        for index, first, end in zip(indices.tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(free)], strict=True):
            positions, size = counts[first:end], self.groups.groups[index].size
            slopes[index] = float(positions.sum()) / size
            if len(positions) < size or positions.min() < positions.max():
                each = np.zeros(size, dtype=np.int64)
                each[free[first:end] - self.starts[index]] = positions
                uneven.append((index, each))
        self.constant.append(int((units < 0).sum()))
        self.slopes.append(slopes)
        if uneven:
            self.uneven[number] = uneven
        return number

    def _joint(self, table: Array) -> int:
        self.joint[len(self.constant)] = table
        self.constant.append(0)
        self.slopes.append({})
        return len(self.constant) - 1

    @property
    def even(self) -> bool:
        """Whether widths alone decide every length."""
        return not self.uneven and not self.joint

    @property
    def linear(self) -> Linear:
        """All forms so far, and the groups that each of them holds; for uneven ones the mean over the units, for joint ones slopes of 0."""
        if self._linear is None or len(self._linear.constant) < len(self.constant):
            slopes = list(self.slopes)
            for number, table in self.joint.items():
                slopes[number] = dict.fromkeys(np.unique(self.group[table[table >= 0]]).tolist(), 0.0)
            entries = [(row, index, slope) for row, each in enumerate(slopes) for index, slope in each.items()]
            form, group = (np.array([entry[at] for entry in entries], dtype=np.int64) for at in range(2))
            self._linear = Linear(np.array(self.constant, dtype=float), form, group, np.array([entry[2] for entry in entries], dtype=float))
        return self._linear

    def expected(self, widths: Array) -> dict[int, Array]:
        """Lengths of the joint forms when units stay independently of each other: (rows,) for widths (rows, groups)."""
        shares = np.repeat(widths / np.diff(self.starts), np.diff(self.starts), axis=1) if self.joint else widths
        lengths = {}
        for number, table in self.joint.items():
            stays = np.where(table >= 0, shares[:, table.clip(0)], 1.0)
            lengths[number] = stays.prod(axis=-1).sum(axis=-1)
        return lengths

    def of(self, kept: Sequence[torch.Tensor]) -> Array:
        """The exact length of every form, (forms,), when these units stay."""
        lengths = self.linear(np.array([[len(stay) for stay in kept]], dtype=float))[0]
        for number, entries in self.uneven.items():
            for index, each in entries:
                lengths[number] += int(each[kept[index].numpy()].sum()) - self.slopes[number][index] * len(kept[index])
            lengths[number] = round(lengths[number])
        if self.joint:
            stays = np.zeros(int(self.starts[-1]), dtype=bool)
            for index, stay in enumerate(kept):
                stays[stay.numpy() + self.starts[index]] = True
            for number, table in self.joint.items():
                lengths[number] = int(np.where(table >= 0, stays[table.clip(0)], True).all(axis=1).sum())
        return lengths


class Prefixes:
    """The exact length of every form when of each group the first units of an order stay: widths alone decide.

    Entry i of ``linear`` has its length at every width in ``table``, from ``offset[i]`` on, where the units differ (``tabled[i]``).
    """

    def __init__(self, lengths: Lengths, orders: Sequence[Array]) -> None:
        self.lengths, linear = lengths, lengths.linear
        slope, self.tabled, self.offset = linear.slope.copy(), np.zeros(len(linear.slope), dtype=np.int64), np.zeros(len(linear.slope), dtype=np.int64)
        tables, end = [np.zeros(1)], 1
        entry = {pair: at for at, pair in enumerate(zip(linear.form.tolist(), linear.group.tolist(), strict=True))} if lengths.uneven else {}
        for number, entries in lengths.uneven.items():
            for index, each in entries:
                at = entry[number, index]
                slope[at], self.tabled[at], self.offset[at] = 0.0, 1, end
                tables.append(np.concatenate([[0], np.cumsum(each[orders[index]])]))
                end += len(each) + 1
        self.linear, self.table = Linear(linear.constant, linear.form, linear.group, slope), np.concatenate(tables)
        self.rank = np.zeros(int(lengths.starts[-1]), dtype=np.int64)
        if lengths.joint:
            for index, order in enumerate(orders):
                self.rank[lengths.starts[index] + order] = np.arange(len(order))

    def values(self, entries: Array | slice, counts: Array) -> Array:
        """What some entries add to their forms at these numbers of units, (…, entries)."""
        summands = counts * self.linear.slope[entries]
        if len(self.table) > 1:
            summands = summands + self.table[self.offset[entries] + self.tabled[entries] * counts.astype(np.int64)]
        return summands

    def __call__(self, counts: Array) -> Array:
        """(rows, forms) for numbers of units (rows, groups)."""
        lengths = self.linear.summed(self.values(slice(None), counts[:, self.linear.group]))
        for row, one in enumerate(counts) if self.lengths.joint else ():
            for number in self.lengths.joint:
                lengths[row, number] = self.joint(number, one)
        return lengths

    def joint(self, number: int, counts: Array) -> int:
        """The length of one joint form at these numbers of units (groups,)."""
        table = self.lengths.joint[number]
        units = table.clip(0)
        return int(((table < 0) | (self.rank[units] < counts[self.lengths.group[units]])).all(axis=1).sum())
