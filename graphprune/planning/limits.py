"""Limits on costs, and how much must go so that they hold where no widths are cut.

Limits are those of :mod:`graphprune.budget.targets`. Where entries become zero, ``params`` counts the entries that stay and ``macs`` the products with them;
masked entries are still stored, so ``size`` cannot be met by masks.

>>> round(smallest(lambda share: {"params": 100 * (1 - share)}, {"params": 25.0}, 0.0), 9)
0.75
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..budget.choose import NARROWEST
from ..budget.targets import show
from ..errors import BadTarget


def smallest(costs: Callable[[float], Mapping[str, float]], limits: Mapping[str, float], ratio: float, text: str = "", levels: Sequence[float] = ()) -> float:
    """The smallest share from ``ratio`` on (of ``levels``, if any are given) at which no cost exceeds its limit; costs fall as it grows.

    Raises :class:`~graphprune.errors.BadTarget` with what can be reached when none does.
    """
    if holds(costs(ratio), limits):
        return ratio
    low, high = ratio, NARROWEST
    least = costs(high)
    if not holds(least, limits):
        raise unmet(least, limits, text)
    if levels:
        steps = sorted({level for level in levels if ratio < level < 1} | {high})
        first, last = 0, len(steps) - 1
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if holds(costs(steps[middle]), limits) else (middle + 1, last)
        return steps[last]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(costs(middle), limits) else (middle, high)
    return high


def holds(costs: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(costs[name] <= limit * (1 + 1e-12) for name, limit in limits.items())


def unmet(least: Mapping[str, float], limits: Mapping[str, float], text: str) -> BadTarget:
    """The error for limits below what can be reached."""
    name = next(name for name, limit in limits.items() if least[name] > limit * (1 + 1e-12))
    return BadTarget(
        f"{name}: at most {show(name, limits[name])} were asked for; the smallest value that granularity {text!r} reaches is {show(name, least[name])} "
        "(something stays of everything it may prune). Ask for less, or cut channels"
    )


def reached(costs: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """One line for each target."""
    return [f"{name}: at most {show(name, limit)} asked, {show(name, costs[name])} left" for name, limit in limits.items()]
