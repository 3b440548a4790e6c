"""What is asked: :class:`Wishes`, and how much must go so that limits hold where no widths are cut.

Limits are those of :mod:`graphprune.budget.targets`. Where entries become zero, ``params`` counts the entries that stay and ``macs`` the products with them;
masked entries are still stored, so ``size`` cannot be met by masks.

>>> round(smallest(lambda share: {"params": 100 * (1 - share)}, {"params": 25.0}, 0.0), 9)
0.75
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..budget.choose import NARROWEST
from ..budget.targets import Aims, show
from ..cost import NAMES, cost
from ..coupling.groups import couple
from ..errors import BadRatio, BadTarget
from ..tracing.trace import Graph
from .entries import Spec

REASONS = {
    "size": "masked entries are stored as zeros: ask for params= or macs=",
    "memory": "it leaves every activation as large as it is: cut channels",
}


@dataclass(frozen=True)
class Wishes:
    """What :func:`~graphprune.shrink` was asked for; ``keep`` names tensors, ``ratios`` is for :mod:`graphprune.names` to read.

    ``multiple_of`` may become a function of the groups, and ``more`` maps the name of a further cost to (its limit, how to
    make it; see :func:`~graphprune.cost.costs`), once the graph is known.
    """

    spec: Spec
    aims: Aims
    ratio: float
    scope: str
    criterion: Any
    batches: Iterable | None
    loss: Callable | None
    keep: Sequence[str]
    ratios: Any
    multiple_of: Any
    min_units: int
    rewrite: bool
    inplace: bool
    more: Mapping[str, tuple[float, Callable]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.spec.coarse:
            return
        if self.multiple_of not in (None, 1) or self.min_units != 1:
            raise BadRatio("multiple_of= and min_units= are about widths; they go with granularity 'channel' or 'head'")
        if self.aims.timed or self.aims.weight:
            text = f"with granularity 'channel' or 'head'; {self.spec.text!r} takes a ratio, params= or macs="
            raise BadTarget(f"latency=, speedup= and objective= are met by widths, {text}")

    @property
    def plain(self) -> bool:
        """Whether one ratio decides, group by group."""
        return self.scope == "layer" and not self.more and not self.aims.any and isinstance(self.multiple_of, int)

    def limits(self, graph: Graph, allowed: Sequence[str]) -> dict[str, float]:
        """The absolute limits; raises :class:`~graphprune.errors.BadTarget` for those that the granularity cannot meet."""
        asked = [name for name in NAMES if getattr(self.aims, name) is not None]
        for name in asked:
            if name not in allowed:
                raise BadTarget(f"{name}= cannot be met with granularity {self.spec.text!r}: {REASONS.get(name, 'it says itself how much goes')}")
        return self.aims.limits(cost(couple(graph))) if asked else {}


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


def holds(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(found[name] <= limit * (1 + 1e-12) for name, limit in limits.items())


def unmet(least: Mapping[str, float], limits: Mapping[str, float], text: str) -> BadTarget:
    """The error for limits below what can be reached."""
    name = next(name for name, limit in limits.items() if least[name] > limit * (1 + 1e-12))
    return BadTarget(
        f"{name}: at most {show(name, limits[name])} were asked for; the smallest value that granularity {text!r} reaches is {show(name, least[name])} "
        "(something stays of everything it may prune). Ask for less, or cut channels"
    )


def reached(found: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """One line for each target."""
    return [f"{name}: at most {show(name, limit)} asked, {show(name, found[name])} left" for name, limit in limits.items()]
