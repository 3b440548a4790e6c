"""Which units of entries go: an exact choice by score, in every weight alone or ranked together.

Counts are exact: ties go by position, later ones first. The order in which units go is found once; how many of them go follows from a ratio, or from
limits on what is left.

>>> order = going(torch.tensor([3.0, 1.0, 1.0, 2.0]))
>>> order.tolist()
[2, 1, 3, 0]
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..errors import BadRatio
from .entries import views
from .spec import Spec
from .weights import Weight


def going(scores: torch.Tensor) -> torch.Tensor:
    """All units, the first to go first."""
    return torch.sort(scores.ravel(), descending=True, stable=True).indices.flip(0)


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the ``count`` units of lowest score; of equal ones the later go first, as everywhere in graphprune.

    >>> lowest(torch.tensor([3.0, 1.0, 1.0, 2.0]), 2).tolist()
    [False, True, True, False]
    """
    return _first(going(scores), count).reshape(scores.shape)


def _first(order: torch.Tensor, count: int) -> torch.Tensor:
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[:count]] = True
    return gone


def share(size: int, ratio: float, name: str) -> int:
    """How many of ``size`` units go; raises :class:`~graphprune.errors.BadRatio` when none would stay."""
    count = math.ceil(ratio * size - 0.5)
    if count >= size:
        raise BadRatio(f"a ratio of {ratio} would empty {name}, which has {size} units; use a smaller ratio there (ratios=) or keep it (keep=)")
    return max(0, count)


@dataclass(frozen=True)
class Pool:
    """Weights whose units are ranked together; ``order``: the units of all of them, one weight after the other, the first to go first."""

    members: tuple[Weight, ...]
    shapes: tuple[torch.Size, ...]
    order: torch.Tensor
    ratio: float | None

    def count(self, ratio: float, strict: bool = True) -> int:
        """How many go; every weight keeps its best unit. ``strict``: a weight alone that would be emptied is an error."""
        ratio = ratio if self.ratio is None else self.ratio
        size, most = len(self.order), len(self.order) - len(self.members)
        wanted = share(size, ratio, self.members[0].name) if strict and len(self.members) == 1 else math.ceil(ratio * size - 0.5)
        return max(0, min(wanted, most))

    def gone(self, ratio: float, strict: bool = True) -> dict[Weight, torch.Tensor]:
        """For every weight, which of its units go (True)."""
        parts = _first(self.order, self.count(ratio, strict)).split([shape.numel() for shape in self.shapes])
        return {weight: part.reshape(shape) for weight, part, shape in zip(self.members, parts, self.shapes, strict=True)}

    def saved(self, ratio: float) -> dict[str, float]:
        """What the units that go would have cost: entries, and products with them."""
        count = self.count(ratio, strict=False)
        return {name: float(rising[count]) for name, rising in self._rising.items()}

    @cached_property
    def _rising(self) -> dict[str, torch.Tensor]:
        entries = [math.prod(weight.shape) / shape.numel() for weight, shape in zip(self.members, self.shapes, strict=True)]
        sizes = torch.tensor([shape.numel() for shape in self.shapes])
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[self.order]
        each = {"params": entries, "macs": [n * weight.macs for n, weight in zip(entries, self.members, strict=True)]}
        start = torch.zeros(1, dtype=torch.float64)
        return {name: torch.cat([start, torch.tensor(values, dtype=torch.float64)[owner].cumsum(0)]) for name, values in each.items()}


def ranked(units: Mapping[Weight, torch.Tensor], spec: Spec, scope: str, shares: Mapping[str, float]) -> list[Pool]:
    """The units of every weight by score. ``scope="layer"`` ranks each weight alone, and so is one with a ratio of its own."""
    pools: dict[object, list[Weight]] = defaultdict(list)
    for weight in units:
        kind = (len(weight.shape), weight.shape[2:], weight.kernel, weight.groups == 1)
        pools[weight if scope == "layer" or weight.name in shares else kind if scope == "isomorphic" else None].append(weight)
    return [_pool(pool, [dead_first(weight, spec, units[weight]) for weight in pool], shares.get(pool[0].name)) for pool in pools.values()]


def _pool(members: Sequence[Weight], scores: Sequence[torch.Tensor], ratio: float | None) -> Pool:
    flats = [units.ravel().double().clone() for units in scores]
    for flat in flats if len(flats) > 1 else ():
        flat[flat.argmax()] = math.inf  # no weight is emptied
    return Pool(tuple(members), tuple(units.shape for units in scores), going(torch.cat(flats)), ratio)


def below(units: Mapping[Weight, torch.Tensor], spec: Spec) -> dict[Weight, torch.Tensor]:
    """The units whose score is below the threshold; raises :class:`~graphprune.errors.BadRatio` where that is all of them."""
    threshold = spec.threshold
    assert threshold is not None
    gone = {weight: dead_first(weight, spec, scores) < threshold for weight, scores in units.items()}
    empty = [weight.name for weight, units_gone in gone.items() if bool(units_gone.all())]
    if empty:
        raise BadRatio(f"a threshold of {threshold} would empty {empty[0]}; use a smaller one, or keep it (keep=)")
    return gone


def dead_first(weight: Weight, spec: Spec, scores: torch.Tensor) -> torch.Tensor:
    """What is masked already goes first, whatever its score: pruning twice to the same ratio changes nothing."""
    view = views(weight, spec)
    scores = scores.cpu()
    if weight.mask is None or view is None:
        return scores
    shape, inside = view
    alive = weight.mask.cpu().reshape(shape)
    alive = alive.any(inside[0], keepdim=True) if len(inside) == 1 else alive.flatten(inside[0]).any(-1).reshape(scores.shape) if inside else alive
    return scores.masked_fill(~alive, -math.inf)
