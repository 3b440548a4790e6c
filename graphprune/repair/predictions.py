"""Outputs that are scores of the entries of a table in which the model looks its inputs up: the next token, say
(:func:`graphprune.coupling.vocabulary.predicted`).

What counts of such outputs are the probabilities that a softmax makes of them, and not how large the scores of thousands of unlikely entries are:
:func:`drawn` gives the gradient whose second moment is the Fisher information, :func:`information` the share of what the predictions say that is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

Tensor = torch.Tensor


def scores(outs: Iterable[Tensor], entries: int) -> Tensor | None:
    """The output that scores the entries."""
    return next((out for out in outs if out.is_floating_point() and out.ndim > 1 and out.shape[-1] == entries), None)


def drawn(out: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the log-likelihood of one entry for each position, drawn from the model's own probabilities; (…, entries) like the scores."""
    probabilities = out.detach().float().softmax(-1)
    marks = torch.rand(probabilities.shape[:-1], generator=generator).to(out.device)
    entry = (probabilities.cumsum(-1) < marks[..., None]).sum(-1).clamp(max=out.shape[-1] - 1)
    return probabilities.neg_().scatter_add_(-1, entry[..., None], torch.ones_like(marks)[..., None]).to(out.dtype)


def information(pairs: Iterable[Sequence[Tensor]]) -> float:
    """Of pairs (the original's scores, another model's): the mean divergence of their probabilities, over what the original's say beyond their mean.

    >>> scores = torch.randn(50, 7)
    >>> information([(scores, scores)]), information([(scores, scores.softmax(-1).mean(0).log().expand(50, 7))])
    (0.0, 1.0)
    """
    lost = entropy = 0.0
    count, mean = 0, torch.zeros(())
    for one, two in pairs:
        logs, others = (each.flatten(0, -2).float().log_softmax(-1) for each in (one, two))
        probabilities = logs.exp()
        lost += float((probabilities * (logs - others)).sum())
        entropy -= float((probabilities * logs).sum())
        count, mean = count + len(logs), mean + probabilities.sum(0, dtype=torch.float64)
    if not count:
        return 0.0
    mean = mean / count
    said = float(torch.special.entr(mean).sum()) - entropy / count
    return round(lost / count / max(said, 1e-9), 6)
