# pyright: strict, reportUnnecessaryIsInstance=false
"""What goes: the units with the lowest scores, under a ratio, per group or ranked together.

``scope="layer"`` removes the same share in every group; ``"global"`` ranks the units of all groups together;
``"isomorphic"`` ranks together only groups that stand in the same kinds of places (Fang et al. 2024). Ties break by
position, so a larger ratio only ever removes more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
import torch

from .arrays import tensor_of
from .coupling.groups import Group, Groups
from .errors import BadRatio
from .operations.labels import Array
from .scores import Scores, kind

Kept = list[torch.Tensor]


def width(size: int, ratio: float, multiple_of: int = 1, min_units: int = 1) -> int:
    """How many of ``size`` units stay.

    >>> width(64, 0.5), width(10, 0.5, multiple_of=4), width(3, 0.9)
    (32, 8, 1)
    """
    left = size - math.ceil(ratio * size - 0.5)
    left = -(-left // multiple_of) * multiple_of
    return min(size, max(left, min_units, 1))


def at_least(min_units: int | Mapping[int, int], index: int) -> int:
    """How many units of a group stay in any case.

    >>> at_least(4, 0), at_least({1: 2}, 0)
    (4, 1)
    """
    return max(1, min_units if isinstance(min_units, int) else min_units.get(index, 1))


def check_ratio(ratio: float, what: str = "ratio") -> float:
    if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 <= ratio < 1:
        raise BadRatio(f"{what} is {ratio!r}; it is the share of units to remove, a number with 0 <= {what} < 1")
    return float(ratio)


def select(
    groups: Groups,
    scores: Scores,
    ratio: float = 0.5,
    *,
    scope: str = "layer",
    multiple_of: int = 1,
    min_units: int | Mapping[int, int] = 1,
    ratios: Mapping[int, float] | None = None,
    ties: Sequence[frozenset[int]] = (),
) -> Kept:
    """The kept units (sorted indices) of every group; ``ratios`` overrides the ratio by group index, and ``min_units`` may be a mapping by it.

    The groups of a tie keep exactly the same share, because the model's code derives one size from the other.
    """
    check_ratio(ratio)
    ranking = Ranking(groups, scores, scope=scope, multiple_of=multiple_of, min_units=min_units, ratios=ratios, ties=ties)
    return ranking.keep(ranking.counts(ratio))


class Ranking:
    """The order in which the units of every group go, and how many stay at any ratio: sorted once, asked often.

    ``orders``: the units of each group, the best first; ties go to the lower position.
    """

    def __init__(
        self,
        groups: Groups,
        scores: Scores,
        *,
        scope: str = "layer",
        multiple_of: int = 1,
        min_units: int | Mapping[int, int] = 1,
        ratios: Mapping[int, float] | None = None,
        ties: Sequence[frozenset[int]] = (),
    ) -> None:
        if scope not in ("layer", "global", "isomorphic"):
            raise BadRatio(f"scope is {scope!r}; it is 'layer', 'global' or 'isomorphic'; shrink also knows 'allocated'")
        self.multiple_of = multiple_of
        self.least = np.array([at_least(min_units, group.index) for group in groups], dtype=np.int64)
        self.sizes = np.array([group.size for group in groups], dtype=np.int64)
        self.orders = orders_of(scores)
        self.ratios = np.full(len(groups), np.nan)  # where a group has none of its own
        for group in groups:
            self.ratios[group.index] = (ratios or {}).get(group.index, np.nan)
        pools: dict[object, list[Group]] = defaultdict(list)
        for group in groups:
            if scope != "layer" and math.isnan(self.ratios[group.index]):
                pools[None if scope == "global" else kind(groups, group)].append(group)
        self.pools = [_ranked(pool, scores) for pool in pools.values() if len(pool) > 1]
        self.ties = [np.array(sorted(tie), dtype=np.int64) for tie in ties]

    def counts(self, ratio: float) -> Array:
        """How many units of every group stay, (groups,)."""
        share = np.where(np.isnan(self.ratios), ratio, self.ratios)
        counts = np.maximum(self.sizes - np.ceil(share * self.sizes - 0.5).astype(np.int64), 1)
        for members, owner in self.pools:
            counts[members] = np.bincount(owner[: width(len(owner), ratio)], minlength=len(members))
        counts = -(-counts // self.multiple_of) * self.multiple_of
        counts = np.minimum(self.sizes, np.maximum(counts, self.least))
        for tie in self.ties:
            sizes, shares = self.sizes[tie], counts[tie] / self.sizes[tie]
            step = math.gcd(*sizes.tolist())
            share = shares.max() if (self.least[tie] > 1).any() else shares.sum() / len(shares)
            steps = max(1, min(step, math.ceil(step * share - 0.5)))
            while steps < step and (sizes * steps // step % self.multiple_of).any():
                steps += 1
            counts[tie] = sizes * steps // step
        return counts

    def keep(self, counts: Array) -> Kept:
        """The best units of every group, as sorted indices."""
        return best(self.orders, counts)


def best(orders: Sequence[Array], counts: Sequence[int] | Array) -> Kept:
    """The first units of every order, as many as counted, as sorted indices."""
    return [tensor_of(np.sort(order[: int(count)])) for order, count in zip(orders, counts, strict=True)]


def orders_of(scores: Scores) -> list[Array]:
    """The units of every group, the best first; ties go to the lower position.

    >>> orders_of([torch.tensor([1.0, 3.0, 2.0, 3.0])])[0].tolist()
    [1, 3, 2, 0]
    """
    return [np.argsort(-each.numpy(), kind="stable") for each in scores]


def _ranked(pool: Sequence[Group], scores: Scores) -> tuple[Array, Array]:
    """Groups that are ranked together, and the member of every unit of theirs, the best unit first."""
    every = torch.cat([scores[group.index] for group in pool])
    owner = np.repeat(np.arange(len(pool)), [group.size for group in pool])
    return np.array([group.index for group in pool]), owner[torch.sort(every, descending=True, stable=True).indices.numpy()]
