"""How far from the best any choice of widths can be: :func:`bound`, a loss that no widths within the limits go below.

In the logarithms of the widths every cost is convex (a sum of products of sums, all with positive factors), so its tangent at any
widths lies below it, and the tangent is a sum over the groups. With the limit's excess weighed by any multiplier (Lagrange), the best
level of each choice is then found by itself; the largest such sum over the multipliers is the bound. A peak is at least what is alive at
one moment, several limits at least what one of them asks for.
"""

from __future__ import annotations

import numpy as np

from ..operations.labels import Array
from .ledger import Ledger
from .problem import Problem

ROUNDS = 80


def bound(problem: Problem, at: Array) -> float | None:
    """A loss that no level numbers within the limits go below, by the tangents at ``at`` (choices,) and at the widest levels.

    The closer ``at`` is to the best, the closer is the bound; under a limit on a peak it may be far.

    None where units of a group differ in what they cost (``lengths.even``), or where time is among the limits: these are not of the form.

    >>> from types import SimpleNamespace
    >>> bound(SimpleNamespace(limits={"time": 1.0}), np.zeros(1)) is None
    True
    """
    if "time" in problem.limits or not problem.known.lengths.even:
        return None
    return max(_tangent(problem, at), _tangent(problem, np.zeros_like(at)))


def _tangent(problem: Problem, at: Array) -> float:
    """The bound by the tangent at these levels alone."""
    ledger, allowed = problem.ledger(at), problem.allowed
    sizes = allowed.ends[allowed.owner] + 1
    group, inside = np.repeat(np.arange(allowed.count), sizes), np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    steps = np.log(allowed.table[np.repeat(allowed.first, sizes) + inside]) - np.log(ledger.counts[group])
    starts = np.cumsum([0, *(len(loss) for loss in problem.losses)])[:-1]
    place = starts[allowed.owner[group]] + inside  # of a group's level among the levels of all choices
    losses, highest = np.concatenate(problem.losses), 0.0
    for part, limit in enumerate(problem.limits.values()):
        slopes = np.bincount(place, _slopes(ledger, part)[group] * steps, len(losses)) / limit
        over = ledger.totals[part] / limit - 1
        highest = max(highest, _highest(losses, slopes, starts, over))
    return highest


def _slopes(ledger: Ledger, part: int) -> Array:
    """The change of a cost for a small relative change of each group's width, (groups,)."""
    values, forms = ledger.values[ledger.bounds[part] : ledger.bounds[part + 1]], ledger.item_forms[ledger.bounds[part] : ledger.bounds[part + 1]]
    if part == ledger.peak and ledger.live is not None:
        moment = int(np.argmax(ledger.alive))
        values = np.where((ledger.live.start <= moment) & (moment <= ledger.live.stop), values, 0.0)
    by_form = sum(np.bincount(column, values, len(ledger.lengths)) for column in forms.T) / np.maximum(ledger.lengths, 1e-300)
    linear = ledger.prefixes.linear
    return np.bincount(linear.group, by_form[linear.form] * linear.slope * ledger.counts[linear.group], len(ledger.counts))


def _highest(losses: Array, slopes: Array, starts: Array, over: float) -> float:
    """The largest value, over multipliers from 0 on, of what the best levels lose and exceed the limit by; it is concave in the multiplier."""
    value = lambda multiplier: float(np.minimum.reduceat(losses + multiplier * slopes, starts).sum() + multiplier * over)  # noqa: E731
    low, high = 0.0, 1.0
    while value(2 * high) > value(high) and high < 1e12:
        high *= 2
    high *= 2
    for _ in range(ROUNDS):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (first, high) if value(first) < value(second) else (low, second)
    return max(0.0, value((low + high) / 2))
