"""Under a budget: :func:`fit` chooses the units that stay so that every limit holds, as closely as units allow.

``scope="layer"`` looks for the one ratio of all groups, ``"global"`` and ``"isomorphic"`` for the cut in their ranking;
a last step takes back, group by group, what still fits. ``"allocated"`` chooses the width of every group by what it
costs (:mod:`graphprune.budget.optimal`). In all scopes a larger budget never leaves less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..cost import Costs
from ..coupling.groups import Groups
from ..coupling.lengths import Prefixes
from ..operations.labels import Array
from ..scores import Scores
from ..select import Kept, Ranking, check_ratio
from .optimal import widths
from .problem import SLACK
from .space import Space, space
from .targets import unreachable

NARROWEST = 1 - 1e-9


def fit(
    groups: Groups,
    scores: Scores,
    limits: Mapping[str, float],
    known: Costs,
    ratio: float = 0.0,
    *,
    scope: str = "layer",
    multiple_of: int | Mapping[int, int] = 1,
    min_units: int | Mapping[int, int] = 1,
    ratios: Mapping[int, float] | None = None,
    ties: Sequence[frozenset[int]] = (),
    time: float = 0.0,
) -> Kept:
    """The kept units of every group, such that no cost exceeds its limit; ``ratio`` of each group goes in any case.

    ``limits`` are absolute and named as in ``known.parts``; ``time`` is how much speed counts against the score (see
    :mod:`graphprune.budget.optimal`; it needs a limit named "time", which may be infinite). Raises :class:`~graphprune.errors.BadTarget` when a limit is
    below what the rules allow; the message gives the smallest reachable value and what holds it.
    """
    check_ratio(ratio)
    allowed = space(groups, ratio, multiple_of=multiple_of, min_units=min_units, ratios=ratios, ties=ties)
    step = multiple_of if isinstance(multiple_of, int) else 1
    alone = "layer" if scope in ("allocated", "optimal") else scope
    ranking = Ranking(groups, scores, scope=alone, multiple_of=step, min_units=min_units, ratios=ratios, ties=ties)
    lengths = Prefixes(known.lengths, ranking.orders)
    if "time" in limits:  # a prediction: the search that set it measures what the narrowest widths really take
        least = known.rowwise(lengths, allowed.least[None], ["time"])["time"][0]
        limits = {**limits, "time": max(limits["time"], float(least) * (1 + 1e-9))}
    error = unreachable(known, lengths, allowed.least, limits, _rules(multiple_of, min_units, ratios))
    if error:
        raise error
    if scope in ("allocated", "optimal"):
        return ranking.keep(widths(groups, scores, limits, known, allowed, lengths, time))

    def at(share: float) -> Array:
        counts = ranking.counts(share)
        return counts if isinstance(multiple_of, int) else allowed.aligned(counts)

    def fits(counts: Array) -> bool:
        costs = known.rowwise(lengths, counts[None], list(limits))
        return all(float(costs[name][0]) <= limit * (1 + SLACK) for name, limit in limits.items())

    counts = at(ratio)
    if not fits(counts):
        low, high = ratio, NARROWEST
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(at(middle)) else (middle, high)
        counts = _take_back(at(high), at(low), fits, allowed)
    return ranking.keep(counts)


def holds(known: Costs, kept: Kept, limits: Mapping[str, float]) -> bool:
    """Whether every limit holds for these units, exactly."""
    lengths = known.lengths.of(kept)[None]
    return all(float(known.parts[name](lengths)[0]) <= limit * (1 + SLACK) for name, limit in limits.items())


def _take_back(narrow: Array, wide: Array, fits: Callable[[Array], bool], allowed: Space) -> Array:
    """From the narrower to the wider of two neighbours, one choice after the other, as long as the limits hold.

    Costs rise with every choice that is taken back, so how many are is found by bisection.
    """

    def first(number: int) -> Array:
        return np.where(allowed.owner < number, wide, narrow)

    low, high = 0, len(allowed.choices)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(first(middle)) else (low, middle - 1)
    return first(low)


def _rules(multiple_of: int | Mapping[int, int], min_units: int | Mapping[int, int], ratios: Mapping[int, float] | None) -> str:
    least = min_units if isinstance(min_units, int) else min(min_units.values(), default=1)
    rules = ["one unit per group" if least <= 1 else f"min_units={least}"]
    rules += ["aligned widths"] if not isinstance(multiple_of, int) else [f"multiple_of={multiple_of}"] if multiple_of > 1 else []
    rules += ["the ratios given for single groups"] if ratios else []
    return ", ".join([*rules, "and what keep rules and operations leave whole"])
