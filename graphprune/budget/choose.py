"""Under a budget: :func:`fit` chooses the units that stay so that every limit holds, as closely as units allow.

``scope="layer"`` looks for the one ratio of all groups, ``"global"`` and ``"isomorphic"`` for the cut in their ranking;
a last step takes back, group by group, what still fits. ``"allocated"`` chooses the width of every group by what it
costs (:mod:`graphprune.budget.optimal`). In all scopes a larger budget never leaves less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..cost import Costs
from ..coupling.groups import Groups
from ..errors import BadTarget
from ..operations.labels import Array
from ..scores import Scores
from ..select import Kept, check_ratio, select
from .optimal import widths
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
    min_units: int = 1,
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
    if "time" in limits:  # a prediction: the search that set it measures what the narrowest widths really take
        limits = {**limits, "time": max(limits["time"], float(known.at(allowed.least[None], ["time"])["time"][0]) * (1 + 1e-9))}
    error = unreachable(known, allowed.least, limits, _rules(multiple_of, min_units, ratios))
    if error:
        raise error
    if scope in ("allocated", "optimal"):
        return _spend(groups, scores, limits, known, allowed, time)

    def at(share: float) -> Kept:
        step = multiple_of if isinstance(multiple_of, int) else 1
        found = select(groups, scores, share, scope=scope, multiple_of=step, min_units=min_units, ratios=ratios, ties=ties)
        return found if isinstance(multiple_of, int) else keep(scores, _aligned(found, allowed))

    kept = at(ratio)
    if holds(known, kept, limits):
        return kept
    low, high = ratio, NARROWEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(known, at(middle), limits) else (middle, high)
    return _take_back(scores, at(high), at(low), limits, known, allowed)


def holds(known: Costs, kept: Kept, limits: Mapping[str, float]) -> bool:
    """Whether every limit holds for these units, exactly."""
    found = known.lengths.of(kept)[None]
    return all(float(known.parts[name](found)[0]) <= limit * (1 + 1e-12) for name, limit in limits.items())


def keep(scores: Scores, counts: Sequence[int] | Array) -> Kept:
    """The best ``counts[i]`` units of each group; ties go to the lower position."""
    orders = (torch.sort(each, descending=True, stable=True).indices for each in scores)
    return [order[: int(count)].sort().values for order, count in zip(orders, counts, strict=True)]


def _take_back(scores: Scores, less: Kept, more: Kept, limits: Mapping[str, float], known: Costs, allowed: Space) -> Kept:
    """From the narrower to the wider of two neighbours, one set of tied groups after the other, while the limits hold."""
    counts = np.array([len(stay) for stay in less])
    for choice in allowed.choices:
        wider = counts.copy()
        wider[list(choice.members)] = [len(more[index]) for index in choice.members]
        if not holds(known, keep(scores, wider), limits):
            break
        counts = wider
    return keep(scores, counts)


def _aligned(kept: Kept, allowed: Space) -> Array:
    """The widths rounded up to the next level."""
    counts = np.array([len(stay) for stay in kept])
    for choice in allowed.choices:
        wide = (choice.levels >= counts[list(choice.members)]).all(axis=1)
        counts[list(choice.members)] = choice.levels[max(int(wide.sum()) - 1, 0)]
    return counts


def _spend(groups: Groups, scores: Scores, limits: Mapping[str, float], known: Costs, allowed: Space, time: float) -> Kept:
    """The best widths; where units of a group differ in what they cost, narrower ones until the limits hold exactly."""
    tight = dict(limits)
    for _ in range(50):
        kept = keep(scores, widths(groups, scores, tight, known, allowed, time))
        if holds(known, kept, limits):
            return kept
        tight = {name: limit * 0.995 for name, limit in tight.items()}
    raise BadTarget("the limits could not be met: units of one group differ too much in what they cost; try scope='layer'")


def _rules(multiple_of: int | Mapping[int, int], min_units: int, ratios: Mapping[int, float] | None) -> str:
    found = ["one unit per group" if min_units <= 1 else f"min_units={min_units}"]
    found += ["aligned widths"] if not isinstance(multiple_of, int) else [f"multiple_of={multiple_of}"] if multiple_of > 1 else []
    found += ["the ratios given for single groups"] if ratios else []
    return ", ".join([*found, "and what keep rules and operations leave whole"])
