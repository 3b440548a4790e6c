"""How :func:`graphprune.shrink` asks for scores while it looks for groups that the model's code allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from ..groups import Groups
from . import Criterion, Score, Scores, named, score


def attempts(
    model: torch.nn.Module, criterion: Criterion, batches: Iterable | None = None, loss: Callable | None = None
) -> Callable[[Groups], Iterator[Scores]]:
    """A function of groups that yields the scores to try in turn: equal ones first where the real ones cost a run of the model.

    Which sizes the code allows hardly depends on the scores; a pass over the data for every attempt would cost as much as the
    one that counts.
    """
    found = named(criterion) if isinstance(criterion, str) else criterion

    def tried(groups: Groups) -> Iterator[Scores]:
        if not isinstance(found, Score) or found.needs_now() != "nothing":
            yield [torch.zeros(group.size, dtype=torch.float64) for group in groups]
        yield score(groups, model, found, batches, loss)

    return tried
