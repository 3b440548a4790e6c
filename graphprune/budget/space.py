"""The widths that may be chosen: :func:`space` lists, for every set of tied groups, its levels from wide to narrow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..coupling.groups import Groups
from ..operations.labels import Array
from ..select import at_least, width


@dataclass(frozen=True)
class Choice:
    """Groups whose widths are chosen together, and their ``levels`` (levels, members), widest first."""

    members: tuple[int, ...]
    levels: Array

    def __len__(self) -> int:
        return len(self.levels)


@dataclass(frozen=True)
class Space:
    """All choices, independent of each other; together they hold every group once."""

    choices: tuple[Choice, ...]
    count: int

    def widths(self, at: Array) -> Array:
        """(rows, groups) widths for level numbers (rows, choices).

        >>> Space((Choice((1,), np.array([[8], [4]])), Choice((0,), np.array([[2]]))), 2).widths(np.array([[1, 0]]))
        array([[2., 4.]])
        """
        return self.table[self.first + at[:, self.owner]].astype(float)

    @cached_property
    def owner(self) -> Array:
        """The choice of every group, (groups,)."""
        owner = np.zeros(self.count, dtype=np.int64)
        for number, choice in enumerate(self.choices):
            owner[list(choice.members)] = number
        return owner

    @cached_property
    def first(self) -> Array:
        """Where in ``table`` the levels of every group begin, (groups,)."""
        first, end = np.zeros(self.count, dtype=np.int64), 0
        for choice in self.choices:
            for index in choice.members:
                first[index], end = end, end + len(choice)
        return first

    @cached_property
    def table(self) -> Array:
        """The widths of all groups at all their levels, one group after the other."""
        return np.concatenate([choice.levels.T.ravel() for choice in self.choices])

    @cached_property
    def ends(self) -> Array:
        """The number of the narrowest level of every choice, (choices,)."""
        return np.array([len(choice) - 1 for choice in self.choices], dtype=np.int64)

    @property
    def least(self) -> Array:
        """The narrowest widths, (groups,)."""
        return self.widths(self.ends[None])[0]

    @property
    def size(self) -> float:
        """How many width vectors there are."""
        return math.prod(float(len(choice)) for choice in self.choices)

    def aligned(self, counts: Array) -> Array:
        """Widths (groups,) rounded up to the next level of their choice, or to its widest.

        >>> Space((Choice((0, 1), np.array([[8, 4], [6, 3], [2, 1]])),), 2).aligned(np.array([5, 3]))
        array([6, 3])
        """
        sizes = self.ends[self.owner] + 1
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # a level number for every entry of the groups, in their order
        wide = self.table[np.repeat(self.first, sizes) + inside] >= np.repeat(counts, sizes)
        level = np.add.reduceat(wide, np.cumsum(sizes) - sizes, dtype=np.int64) - 1
        at = np.full(len(self.choices), sizes.max())
        np.minimum.at(at, self.owner, level)
        return self.table[self.first + np.maximum(at, 0)[self.owner]]


def space(
    groups: Groups,
    ratio: float = 0.0,
    *,
    multiple_of: int | Mapping[int, int] = 1,
    min_units: int | Mapping[int, int] = 1,
    ratios: Mapping[int, float] | None = None,
    ties: Sequence[frozenset[int]] = (),
) -> Space:
    """Every width from that of ``ratio`` down to ``min_units``, in multiples of ``multiple_of`` (an int, or one by group).

    A group with its own ratio has one level. The full width is always a level when ``ratio`` is 0.
    """
    tied = [tuple(sorted(tie)) for tie in ties]
    joined = {index for tie in tied for index in tie}
    single = [(group.index,) for group in groups if group.index not in joined]
    overrides = dict(ratios or {})
    choices = []
    for members in [*single, *tied]:
        sizes = [groups.groups[index].size for index in members]
        steps = [multiple_of if isinstance(multiple_of, int) else multiple_of.get(index, 1) for index in members]
        fixed = [overrides[index] for index in members if index in overrides]
        share = sum(fixed) / len(fixed) if fixed else ratio
        least = np.array([at_least(min_units, index) for index in members])
        levels = _levels(np.array(sizes), np.array(steps), share, least)
        choices.append(Choice(members, levels[-1:] if fixed else levels[::-1]))
    return Space(tuple(choices), len(groups))


def _levels(sizes: Array, steps: Array, ratio: float, min_units: Array) -> Array:
    """(levels, members) widths that members of these sizes may have together, narrowest first."""
    parts = math.gcd(*sizes.tolist())
    top = width(parts, ratio) if len(sizes) > 1 else width(parts, ratio, int(steps[0]), int(min_units[0]))
    every = np.arange(1, top + 1)[:, None] * (sizes // parts)
    whole = every[((every % steps == 0) | (every == sizes)).all(axis=1)]
    offered = whole if len(whole) else every
    enough = offered[(offered >= np.minimum(min_units, sizes)).all(axis=1)]
    return enough if len(enough) else every[-1:]
