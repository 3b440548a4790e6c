"""Making the scores of different groups comparable before they are ranked together.

>>> normalise([torch.tensor([1.0, 3.0])], "mean")[0].tolist()
[0.5, 1.5]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..coupling.groups import Group, Groups
from ..errors import UnknownName

Tensor = torch.Tensor


def _by(size: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    def fit(every: Tensor) -> Callable[[Tensor], Tensor]:
        scale = size(every)
        return lambda scores: scores / scale if scale > 0 else scores

    return fit


def _standard(every: Tensor) -> Callable[[Tensor], Tensor]:
    spread = every.std(correction=0)
    return lambda scores: (scores - every.mean()) / spread if spread > 0 else scores - every.mean()


# Each is fitted to all scores of a pool and then applied to every group of it.
NORMALISERS: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "none": lambda every: lambda scores: scores,
    "mean": _by(lambda every: every.abs().mean()),
    "max": _by(lambda every: every.abs().max()),
    "l2": _by(lambda every: every.norm()),
    "standardise": _standard,
}


def kind(groups: Groups, group: Group) -> tuple[Any, ...]:
    """The isomorphic class (Fang et al. 2024): the ordered kinds of places, as tensor rank, axis, and last part of the name."""
    leaves = groups.graph.leaves
    return tuple((len(leaves[name].shape), axis, name.rpartition(".")[2]) for name, axis in group.places)


def normalise(scores: Sequence[Tensor], how: str, pools: Sequence[object] | None = None) -> list[Tensor]:
    """Scale the scores of each pool of groups together (default: each group by itself)."""
    if how == "none":
        return list(scores)
    if how not in NORMALISERS:
        raise UnknownName(f"normalise is {how!r}; it is one of {', '.join(NORMALISERS)}")
    members: dict[object, list[int]] = defaultdict(list)
    for index in range(len(scores)):
        members[pools[index] if pools else index].append(index)
    fitted = {pool: NORMALISERS[how](torch.cat([scores[i] for i in indices])) for pool, indices in members.items()}
    return [fitted[pools[index] if pools else index](group_scores) for index, group_scores in enumerate(scores)]


def normalised(groups: Groups, scores: Sequence[Tensor], how: str, within: str = "group") -> list[Tensor]:
    """Scale within each group, or within each isomorphic class of groups."""
    if within not in ("group", "class"):
        raise UnknownName(f"within is {within!r}; it is 'group' or 'class'")
    return normalise(scores, how, [kind(groups, group) for group in groups] if within == "class" else None)
