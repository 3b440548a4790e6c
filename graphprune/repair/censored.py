"""Least squares where only what an activation lets pass counts.

To a ReLU all negative sums are the same. So the target of a weight before it is an interval: the one number that the activation passes
on, or all those that it makes the same of (a regression on censored data: Tobin 1958). The squared distance from intervals is convex in
the weights. It falls with every round of: move each prediction to the nearest point of its interval, fit these points (majorisation: Hunter
and Lange 2004). The matrix of the inputs stays, so it is factored once. Zhang et al. 2015 fit behind a ReLU as well, with a relaxation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .moments import Moments
from .solve import Fit

Tensor = torch.Tensor
ROUNDS, ENOUGH = 20, 1e-3  # rounds at most; the last one won less than this share of the distance


@dataclass(frozen=True)
class Rows:
    """What a weight reads, x (g, n, d), and the intervals in which its outputs should lie, (g, n, o) each; in parts along n."""

    parts: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def __add__(self, other: Rows) -> Rows:
        return Rows((*self.parts, *other.parts))

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, lower and upper ends of all rows."""
        x, low, high = (torch.cat([part[i] for part in self.parts], 1) for i in range(3))
        return x, low, high


def intervals(y: Tensor, z: Tensor, gain: Tensor, ends: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Lower and upper ends, like y (n, o): y itself where the activation passes z on, else all that lies beyond where z meets its end.

    ``z`` is what the activation reads when y is written, ``gain`` how y moves with z, ``ends`` between what the activation is not flat.

    >>> low, high = intervals(torch.tensor([[5.0, 1.0]]), torch.tensor([[-1.0, 2.0]]), torch.tensor([2.0, 2.0]), (0.0, math.inf))
    >>> low.tolist(), high.tolist()
    ([[-inf, 1.0]], [[7.0, 1.0]])
    """
    low, high = y.clone(), y.clone()
    for end, beyond, way in ((ends[0], z <= ends[0], -1), (ends[1], z >= ends[1], 1)):
        if math.isfinite(end):
            edge = y + (end - z) * gain
            open_above, open_below = beyond & (way * gain > 0), beyond & (way * gain < 0)
            low = torch.where(open_above, edge, low.masked_fill(open_below, -math.inf))
            high = torch.where(open_below, edge, high.masked_fill(open_above, math.inf))
    return low, high


def distance(rows: Rows, weight: Tensor, bias: Tensor) -> float:
    """``E|p − nearest point of the interval|²`` with ``p = W x + b``, summed over the outputs."""
    total, count = 0.0, 0
    for x, low, high in rows.parts:
        outputs = torch.baddbmm(bias.to(x)[:, None], x, weight.to(x).transpose(1, 2))
        total += float((outputs - outputs.clamp(low, high)).square().sum(dtype=torch.float64))
        count += x.shape[1]
    return total / max(count, 1)


def censored(rows: Rows, data: Moments, ridge: float, start: Fit, intercept: bool = True, rounds: int = ROUNDS, enough: float = ENOUGH) -> Fit:
    """``argmin E|p − nearest point|² + λ‖W − W₀‖²`` from ``start``, W₀ (g, o, d) and b (g, o), with ``λ = ridge · mean diag``.

    ``data`` are the moments of the same rows. It ends when a round wins less than ``enough`` of the objective. Where the ridge is too
    small for the rows, the start is what comes back.

    >>> from .moments import moments
    >>> x = torch.linspace(-1, 1, 41, dtype=torch.float64).reshape(1, -1, 1)
    >>> low, high = intervals(2 * x[0], 2 * x[0], torch.ones(1), (0.0, math.inf))
    >>> some = Rows(((x, low[None], high[None]),))
    >>> weight, bias = censored(some, moments(x, x), 0.0, (torch.ones(1, 1, 1), torch.zeros(1, 1)), rounds=500, enough=0.0)
    >>> round(float(weight), 3), round(float(bias), 3)  # the line itself: nothing pulls it up where it is negative
    (2.0, 0.0)
    """
    x, low, high = rows.whole()
    centre, gram = data.x[:, None], data.xx
    if not intercept:
        gram, centre = gram + data.count * centre.transpose(1, 2) * centre, torch.zeros_like(centre)
    x -= centre.to(x)
    weight = first = start[0].double()
    damp = (ridge * gram.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=torch.finfo(gram.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(damp[:, None].expand(-1, gram.shape[1])))
    if bool(failed.any()):
        return start
    middle, best = start[1].double() + (weight @ centre.transpose(1, 2))[..., 0], math.inf
    for _ in range(rounds):
        outputs = torch.baddbmm(middle.to(x)[:, None], x, weight.to(x).transpose(1, 2))
        wanted = outputs.clamp(low, high)
        far = float((outputs - wanted).square().sum(dtype=torch.float64)) + float((damp * (weight - first).square().sum((1, 2))).sum())
        if best - far <= enough * far:
            break
        best = far
        if intercept:
            middle = wanted.mean(1, dtype=torch.float64)
            wanted -= middle.to(x)[:, None]
        cross = (wanted.transpose(1, 2) @ x).double() + damp[:, None, None] * first
        weight = torch.cholesky_solve(cross.transpose(1, 2), factor).transpose(1, 2)
    return weight, middle - (weight @ centre.transpose(1, 2))[..., 0] if intercept else torch.zeros_like(middle)
