"""The widths that may be chosen: :func:`space` lists, for every set of tied groups, its levels from wide to narrow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..coupling.groups import Groups
from ..operations.labels import Array
from ..select import width


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
        found = np.zeros((len(at), self.count))
        for column, choice in enumerate(self.choices):
            found[:, choice.members] = choice.levels[at[:, column]]
        return found

    @property
    def least(self) -> Array:
        """The narrowest widths, (groups,)."""
        return self.widths(np.array([[len(choice) - 1 for choice in self.choices]]))[0]

    @property
    def size(self) -> float:
        """How many width vectors there are."""
        return math.prod(float(len(choice)) for choice in self.choices)


def space(
    groups: Groups,
    ratio: float = 0.0,
    *,
    multiple_of: int | Mapping[int, int] = 1,
    min_units: int = 1,
    ratios: Mapping[int, float] | None = None,
    ties: Sequence[frozenset[int]] = (),
) -> Space:
    """Every width from that of ``ratio`` down to ``min_units``, in multiples of ``multiple_of`` (an int, or one by group).

    A group with its own ratio has one level. The full width is always a level when ``ratio`` is 0.
    """
    tied = [tuple(sorted(tie)) for tie in ties]
    single = [(group.index,) for group in groups if not any(group.index in tie for tie in tied)]
    own = dict(ratios or {})
    choices = []
    for members in [*single, *tied]:
        sizes = [groups.groups[index].size for index in members]
        steps = [multiple_of if isinstance(multiple_of, int) else multiple_of.get(index, 1) for index in members]
        parts = math.gcd(*sizes)
        fixed = [own[index] for index in members if index in own]
        share = sum(fixed) / len(fixed) if fixed else ratio
        top = width(parts, share) if len(members) > 1 else width(parts, share, steps[0], min_units)
        levels = [tuple(size * part // parts for size in sizes) for part in range(1, top + 1)]
        whole = [level for level in levels if all(w % step == 0 or w == size for w, step, size in zip(level, steps, sizes, strict=True))]
        levels = [level for level in whole or levels if all(w >= min(min_units, size) for w, size in zip(level, sizes, strict=True))] or levels[-1:]
        choices.append(Choice(members, np.array(levels[-1:] if fixed else levels[::-1], dtype=np.int64)))
    return Space(tuple(choices), len(groups))
