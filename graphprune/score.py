"""What matters: a score for every unit of every group, from all the weights it would take along.

``l1`` and ``l2`` sum over every member slice of a unit (DepGraph's group norm, Fang et al. 2023); ``random`` is the
baseline every other criterion has to beat. A score may also be any function of ``(groups, tensors)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .errors import UnknownName
from .groups import Groups
from .sums import unit_sums
from .trees import leaf_tensors

Scores = list[torch.Tensor]
Scorer = Callable[[Groups, Mapping[str, torch.Tensor]], Scores]


def norm(groups: Groups, tensors: Mapping[str, torch.Tensor], power: int) -> Scores:
    """Sum of ``|w| ** power`` over all entries of each unit (its root for 2), as a float64 tensor per group."""
    found = unit_sums(groups, tensors, power)
    return [total.sqrt() for total in found] if power == 2 else found


def random(groups: Groups, tensors: Mapping[str, torch.Tensor], seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups]


SCORES: dict[str, Scorer] = {
    "l1": lambda groups, tensors: norm(groups, tensors, 1),
    "l2": lambda groups, tensors: norm(groups, tensors, 2),
    "random": random,
}


def score(groups: Groups, model: torch.nn.Module, criterion: str | Scorer = "l2") -> Scores:
    """A tensor of shape (units,) for each group; larger means more important.

    Raises :class:`~graphprune.errors.UnknownName` for a criterion that does not exist.
    """
    tensors = {name: tensor for name, _, _, tensor in leaf_tensors(model)}
    if callable(criterion):
        return criterion(groups, tensors)
    if criterion not in SCORES:
        raise UnknownName(f"no score named {criterion!r}; there are {', '.join(SCORES)}, or give a function")
    return SCORES[criterion](groups, tensors)
