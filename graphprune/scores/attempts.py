"""How :func:`graphprune.shrink` asks for scores while it looks for groups that the model's code allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..coupling.groups import Groups
from . import Criterion, Score, Scores, named, score

Attempts = Callable[[Groups], Iterator[tuple[bool, Scores]]]


def attempts(
    model: torch.nn.Module, criterion: Criterion, batches: Iterable[Any] | None = None, loss: Callable[..., Any] | None = None, draft: bool = False
) -> Attempts:
    """A function of groups that yields the scores to try in turn: equal ones first, as a draft, then the real ones.

    With them goes whether what they lead to need not be proved, for the ones after them cost less than a proof.

    Which sizes the code allows hardly depends on the scores; a pass over the data for every attempt would cost as much as
    the one that counts, so scores that need one are always drafted. ``draft`` asks for it where reading the weights is
    all there is to save: within each group the widths, and so what the code allows, are the same for any scores.
    """
    chosen = named(criterion) if isinstance(criterion, str) else criterion

    def tried(groups: Groups) -> Iterator[tuple[bool, Scores]]:
        graph = groups.graph
        asked = graph.calls or graph.equals or graph.floats or graph.outcomes  # without a size in the code no width can be wrong
        cheap = isinstance(chosen, Score) and chosen.needs_now() == "nothing"
        if asked and (draft or not cheap):
            yield cheap, [torch.zeros(group.size, dtype=torch.float64) for group in groups]
        yield False, score(groups, model, chosen, batches, loss)

    return tried


def remembered(scored: Attempts) -> Attempts:
    """Scores of equal groups are computed once, however many widths are tried."""
    known: dict[tuple[Any, ...], tuple[list[tuple[bool, Scores]], Iterator[tuple[bool, Scores]]]] = {}

    def tried(groups: Groups) -> Iterator[tuple[bool, Scores]]:
        done, rest = known.setdefault(groups.key, ([], scored(groups)))
        yield from done
        for each in rest:
            done.append(each)
            yield each

    return tried
