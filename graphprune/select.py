"""What goes: the units with the lowest scores, under a ratio, per group or ranked together.

``scope="layer"`` removes the same share in every group; ``"global"`` ranks the units of all groups together;
``"isomorphic"`` ranks together only groups that stand in the same kinds of places (Fang et al. 2024). Ties break by
position, so a larger ratio only ever removes more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .coupling.groups import Group, Groups
from .errors import BadRatio
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


def check_ratio(ratio: float, what: str = "ratio") -> float:
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < 1:
        raise BadRatio(f"{what} is {ratio!r}; it is the share of units to remove, a number with 0 <= {what} < 1")
    return float(ratio)


def select(
    groups: Groups,
    scores: Scores,
    ratio: float = 0.5,
    *,
    scope: str = "layer",
    multiple_of: int = 1,
    min_units: int = 1,
    ratios: Mapping[int, float] | None = None,
    ties: Sequence[frozenset[int]] = (),
) -> Kept:
    """The kept units (sorted indices) of every group; ``ratios`` overrides the ratio by group index.

    The groups of a tie keep exactly the same share, because the model's code derives one size from the other.
    """
    check_ratio(ratio)
    own = dict(ratios or {})
    if scope not in ("layer", "global", "isomorphic"):
        raise BadRatio(f"scope is {scope!r}; it is 'layer', 'global' or 'isomorphic'; shrink also knows 'allocated'")
    pools: dict[object, list[Group]] = defaultdict(list)
    for group in groups:
        alone = scope == "layer" or group.index in own
        pools[group.index if alone else None if scope == "global" else kind(groups, group)].append(group)
    counts = {}
    for pool in pools.values():
        shares = _shares(pool, scores, [own.get(group.index, ratio) for group in pool])
        for group, count in zip(pool, shares, strict=True):
            count = -(-count // multiple_of) * multiple_of
            counts[group.index] = min(group.size, max(count, min_units, 1))
    for tie in ties:
        sizes = {index: groups.groups[index].size for index in tie}
        step = math.gcd(*sizes.values())
        share = max(counts[index] / size for index, size in sizes.items()) if min_units > 1 else None
        means = sum(counts[index] / size for index, size in sizes.items()) / len(sizes)
        steps = max(1, min(step, math.ceil(step * (share or means) - 0.5)))
        counts.update({index: size * steps // step for index, size in sizes.items()})
    kept = []
    for group in groups:
        order = np.argsort(-scores[group.index].numpy(), kind="stable")[: counts[group.index]]
        order.sort()
        kept.append(torch.from_numpy(order))
    return kept


def _shares(pool: Sequence[Group], scores: Scores, ratios: Sequence[float]) -> list[int]:
    if len(pool) == 1:
        return [width(pool[0].size, ratios[0])]
    every = torch.cat([scores[group.index] for group in pool])
    owner = torch.cat([torch.full((group.size,), i) for i, group in enumerate(pool)])
    order = torch.sort(every, descending=True, stable=True).indices[: width(len(every), ratios[0])]
    return torch.bincount(owner[order], minlength=len(pool)).tolist()
