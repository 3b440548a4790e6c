"""Scores that measure no importance of their own: the random baseline, and an ensemble of other scores."""

from __future__ import annotations

from typing import Any

import torch

from .registry import NEEDS, Score, named, scorer
from .task import Scores, Task


@scorer("others", "uniform random numbers: the baseline that every score has to beat", "Mittal et al. 2018", cost="nothing")
def random(task: Task, seed: int = 0) -> Scores:
    """Independent uniform numbers in [0, 1), from ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(group.size, generator=generator, dtype=torch.float64) for group in task.groups]


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Ranks in [0, 1], ties sharing their mean rank.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0, 2.0], dtype=torch.float64)).tolist()
    [0.8333333333333334, 0.0, 0.8333333333333334, 0.3333333333333333]
    """
    values, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts - 1) / 2)[place] / max(len(scores) - 1, 1)


def _members(of: Any) -> list[Score]:
    return [member if isinstance(member, Score) else named(member) for member in of]


def _needs(options: dict[str, Any]) -> str:
    asked = [member.needs_now() for member in _members(options.get("of", DEFAULT))]
    return max(asked, key=NEEDS.index, default="nothing")


DEFAULT = ("l2", "fpgm", "redundancy")


def _ensemble(task: Task, of: Any = DEFAULT, weights: Any = None) -> Scores:
    """``Σ_k w_k rank_k(c)``: the (weighted) mean of each unit's rank in its group under the scores ``of`` (names or Scores)."""
    members = _members(of)
    share = torch.tensor(weights if weights is not None else [1.0] * len(members), dtype=torch.float64)
    share = share / share.sum()
    batches, loss = (task.source.batches, task.source.loss) if task.source else (None, None)
    if task.source and len([m for m in members if m.needs_now() != "nothing"]) > 1:
        task.data.twice()
    each = [member(task.groups, task.model, batches, loss) for member in members]
    return [torch.stack([w * ranks(scores) for w, scores in zip(share, of_group, strict=True)]).sum(0) for of_group in zip(*each, strict=True)]


_ensemble.__name__ = "ensemble"
_ensemble.needs = _needs
ensemble = scorer("others", "mean rank under several scores", "Borda 1781", cost="the sum of its members")(_ensemble)
