"""What a greedy removal costs on samples that no fit has seen: :func:`unseen` corrects the losses that the search itself promises.

Of a few hundred samples a wide layer behind small maps seems to follow from almost any part of itself: the search promises losses near zero
that no refit keeps. So the removal is followed at some widths with the refit of one part of the samples measured on the other, and the
promised losses between two widths are scaled to what was measured there. The order of the removal stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..scores.order import in_order

Tensor = torch.Tensor
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
STEPS = 10


@dataclass(frozen=True)
class Halves:
    """Covariances of what one consumer reads, on samples for the fit and on others, and what it makes of errors there."""

    fit: Tensor  # (columns, columns)
    check: Tensor | None
    writes: Tensor  # (outputs, columns); an error e costs E‖writes · e‖²
    blocks: Tensor  # the columns of each unit, (units, columns of each)


def unseen(losses: Tensor, parts: Sequence[Halves], steps: int = STEPS) -> Tensor:
    """Losses (units,) of a greedy removal, scaled piece by piece to the loss of the refit on samples kept out of it.

    >>> eye = torch.eye(4, dtype=torch.float64)
    >>> halves = Halves(eye, 2 * eye, eye, torch.arange(4)[:, None])
    >>> unseen(torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64), [halves], steps=2).round(decimals=6).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    order = torch.argsort(losses, stable=True)
    counts = sorted({round(len(order) * step / steps) for step in range(1, steps + 1)} - {0})
    values = losses[order].clone()
    before, start = 0.0, 0
    for count in counts:
        worst = max(sum(_loss(part, order[:count], order[count:]) for part in parts), before)
        promised = float(values[start:count].sum())
        values[start:count] = values[start:count] * ((worst - before) / promised) if promised > 0 else (worst - before) / (count - start)
        before, start = worst, count
    return in_order(order.tolist(), values.tolist())


def _loss(part: Halves, gone: Tensor, stay: Tensor) -> float:
    """``E‖writes · (x_gone − M x_stay)‖²`` with M fitted on one part and the mean over the other, for the best ridge."""
    assert part.check is not None  # only what was measured on other samples is corrected
    p, k = part.blocks[gone].flatten(), part.blocks[stay].flatten()
    writes = part.writes[:, p]
    alone = float(((writes @ part.check[p][:, p]) * writes).sum())
    if not len(k):
        return alone
    gram, there, twice = part.fit[k][:, k], part.check[k][:, k], 2 * part.check[k][:, p] @ writes.T
    wanted = part.fit[k][:, p] @ writes.T
    power = torch.where(gram.diagonal() > 0, gram.diagonal(), 1.0)  # a ridge for each column by its own size: rescaled channels change nothing
    best = alone
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(ridge * power))
        if not bool(failed):
            maps = torch.cholesky_solve(wanted, factor)
            best = min(best, alone + float(((there @ maps - twice) * maps).sum()))
    return max(best, 0.0)
