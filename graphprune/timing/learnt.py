"""What earlier searches of the same model measured: :class:`Learnt`, predicted and measured times, and how often they were measured.

A search starts at the widths that met the time before, so with a warm table one measurement is the rule. Two processes time
one and the same model up to a few per cent apart (where its weights lie in memory, what else the machine does), which no number of rounds
within one of them averages out. So where the new measurement agrees with the earlier ones of the same widths, their mean
decides whether the time is met, unless the new one by itself is twice as far off as is allowed; where it does not agree, the new one alone
counts, and the earlier ones are forgotten. A clock of the user's own is taken at its word: nothing is averaged.
Nothing here replaces a measurement: what a search returns it has timed itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TOLERANCE = 0.015
AGREE = 2 * TOLERANCE  # how far apart (log) two processes may time the same widths
COUNTED, KEPT = 3, 12  # how many searches weigh against the new one, and how many widths are remembered


class Point(NamedTuple):
    """Logarithms of predicted and measured time as shares of the original's, and in how many searches that was measured."""

    predicted: float
    measured: float
    searches: int = 1


@dataclass(frozen=True)
class Learnt:
    """Points of one model on one runtime, the latest last."""

    points: tuple[Point, ...] = ()

    @classmethod
    def read(cls, rows: Any) -> Learnt:
        """From the table on disk; what is no point is left out.

        >>> Learnt.read([[-0.6, -0.7], [-0.5, "x"], [-0.4, -0.5, 2]]).points[1]
        Point(predicted=-0.4, measured=-0.5, searches=2)
        """
        return cls(tuple(Point(*row) for row in (rows if isinstance(rows, list) else ()) if _is_point(row)))

    def at(self, predicted: float) -> Point | None:
        """What is known of the widths with this prediction."""
        return next((point for point in reversed(self.points) if abs(point.predicted - predicted) < 1e-9), None)

    def pooled(self, predicted: float, measured: float) -> Point:
        """The mean of a new measurement and the earlier ones of the same widths, if they agree; otherwise the new one.

        >>> Learnt((Point(-0.6, -0.70),)).pooled(-0.6, -0.68).searches, Learnt((Point(-0.6, -0.70),)).pooled(-0.6, -0.6)
        (2, Point(predicted=-0.6, measured=-0.6, searches=1))
        """
        known = self.at(predicted)
        if known is None or abs(known.measured - measured) > AGREE:
            return Point(predicted, measured)
        count = min(known.searches, COUNTED)
        return Point(predicted, (count * known.measured + measured) / (count + 1), count + 1)

    def told(self, point: Point) -> Learnt:
        """With this point in the place of the one of the same widths."""
        return Learnt((*(known for known in self.points if abs(known.predicted - point.predicted) >= 1e-9), point)[-KEPT:])

    def first(self, wanted: float) -> float:
        """The first guess: the widths that met the target most often, or what lies around it; later guesses are made from
        what is measured then."""
        met = [point for point in self.points if abs(point.measured - wanted) <= TOLERANCE]
        if met:
            return max(met, key=lambda point: (point.searches, -abs(point.measured - wanted))).predicted + 1e-9
        return guess([(0.0, 0.0), *((point.predicted, point.measured) for point in self.points)], wanted)


def guess(points: Sequence[tuple[float, float]], wanted: float) -> float:
    """Where predicted time (log) should give the ``wanted`` measured one: between neighbours, or beyond the last by its slope.

    >>> guess([(0.0, 0.0)], -1.0), round(guess([(0.0, 0.0), (-1.0, -0.8)], -1.0), 3)
    (-1.0, -1.25)
    """
    if wanted >= 0:
        return 0.0  # the original itself
    below = [p for p in points if p[1] <= wanted]
    above = [p for p in points if p[1] > wanted] or [(0.0, 0.0)]
    right = min(above, key=lambda p: p[1])
    if below:
        low = max(below, key=lambda p: p[1])
        part = (wanted - right[1]) / (low[1] - right[1])
        return right[0] + part * (low[0] - right[0])
    slope = min(max(right[1] / right[0], 0.4), 2.0) if right[0] else 1.0
    return right[0] + (wanted - right[1]) / slope


def _is_point(row: Any) -> bool:
    if not isinstance(row, list) or len(row) not in (2, 3) or not all(isinstance(value, int | float) and math.isfinite(value) for value in row):
        return False
    return row[0] < 0 and (len(row) == 2 or (isinstance(row[2], int) and row[2] >= 1))
