"""The length of every axis as a function of how many units each group keeps.

An axis is a row of positions, each belonging to a unit or to none, so its length is a constant plus, for every group,
(positions per unit) x (kept units). Where all units of a group have equally many positions the width alone decides;
otherwise the length depends on which units stay, and :meth:`Lengths.of` counts them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..operations.labels import Array
from ..operations.notation import Value
from .groups import Groups


@dataclass
class Lengths:
    """Distinct lengths ("forms"), numbered; form 0 is the constant 1.

    ``constant``: (forms,), ``slopes``: (forms, groups) positions per unit, ``uneven``: forms whose exact length needs to
    know which units stay, as (group, positions of each unit) pairs; ``joint``: forms of axes on which several groups
    meet position by position, as unit numbers of each position (positions, fields), -1 where the position stays.
    """

    groups: Groups
    constant: list[int] = field(default_factory=lambda: [1])
    slopes: list[dict[int, float]] = field(default_factory=lambda: [{}])
    uneven: dict[int, list[tuple[int, Array]]] = field(default_factory=dict)
    joint: dict[int, Array] = field(default_factory=dict)
    _known: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = self.groups
        self.starts = np.cumsum([0, *(group.size for group in groups)])
        self.unit = np.full(len(groups.root), -1, dtype=np.int64)  # of every set of labels, numbered over all groups
        for group in groups:
            self.unit[group.units] = np.arange(group.size) + self.starts[group.index]
        self.group = np.repeat(np.arange(len(groups)), [group.size for group in groups])

    def form(self, value: Value, dim: int) -> tuple[int, int]:
        """The axis as (factor, form): its length is factor x form."""
        held = [f for f in value.fields if f.shape[dim] > 1]
        if not held:
            return value.shape[dim], 0
        key = tuple((id(f), dim) for f in held)
        if key not in self._known:
            self._known[key] = (self._find([self._column(f, dim) for f in held], value.shape[dim]), held)
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
        number, slopes, uneven = len(self.constant), {}, []
        for index in np.unique(self.group[free]):
            mine = self.group[free] == index
            size = self.groups.groups[index].size
            slopes[int(index)] = float(counts[mine].sum()) / size
            if mine.sum() < size or counts[mine].min() < counts[mine].max():
                each = np.zeros(size, dtype=np.int64)
                each[free[mine] - self.starts[index]] = counts[mine]
                uneven.append((int(index), each))
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

    def matrix(self) -> tuple[Array, Array]:
        """``constant`` (forms,) and ``slopes`` (forms, groups) as arrays."""
        slopes = np.zeros((len(self.constant), len(self.groups)))
        for row, entries in enumerate(self.slopes):
            for index, slope in entries.items():
                slopes[row, index] = slope
        return np.array(self.constant, dtype=float), slopes

    def expected(self, widths: Array) -> dict[int, Array]:
        """Lengths of the joint forms when units stay independently of each other: (rows,) for widths (rows, groups)."""
        shares = np.repeat(widths / np.diff(self.starts), np.diff(self.starts), axis=1) if self.joint else widths
        found = {}
        for number, table in self.joint.items():
            stays = np.where(table >= 0, shares[:, table.clip(0)], 1.0)
            found[number] = stays.prod(axis=-1).sum(axis=-1)
        return found

    def of(self, kept: Sequence[torch.Tensor]) -> Array:
        """The exact length of every form, (forms,), when these units stay."""
        constant, slopes = self.matrix()
        found = constant + slopes @ np.array([len(stay) for stay in kept], dtype=float) if len(kept) else constant
        for number, entries in self.uneven.items():
            even = {index: slope for index, slope in self.slopes[number].items() if index not in {i for i, _ in entries}}
            found[number] = constant[number] + sum(slope * len(kept[index]) for index, slope in even.items())
            found[number] += sum(int(each[kept[index].numpy()].sum()) for index, each in entries)
        if self.joint:
            stays = np.zeros(int(self.starts[-1]), dtype=bool)
            for index, stay in enumerate(kept):
                stays[stay.numpy() + self.starts[index]] = True
            for number, table in self.joint.items():
                found[number] = int(np.where(table >= 0, stays[table.clip(0)], True).all(axis=1).sum())
        return found
