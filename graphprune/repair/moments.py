"""What a linear fit needs to know of its data: counts, means and centred co-moments, added up batch by batch.

The size is that of the matrices, whatever the number of batches. Sums are kept in float64; products of a batch are taken in
the batch's own type (float32 or float64) after its own means are removed, so nothing cancels (Chan, Golub and LeVeque 1983).

>>> x, y = torch.randn(1, 50, 3, dtype=torch.float64), torch.randn(1, 50, 2, dtype=torch.float64)
>>> halves = moments(x[:, :20], y[:, :20]) + moments(x[:, 20:], y[:, 20:])
>>> torch.allclose(halves.xx, moments(x, y).xx)
True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..scores.waiting import inner

Tensor = torch.Tensor


@dataclass(frozen=True)
class Moments:
    """Of ``count`` rows in each of g blocks: means (g, d) and (g, o), centred sums of products (g, d, d), (g, o, d), and of squares (g, o)."""

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    def __add__(self, other: Moments) -> Moments:
        total = self.count + other.count
        dx, dy, weight = other.x - self.x, other.y - self.y, self.count * other.count / total
        share = other.count / total
        return Moments(
            total,
            self.x + share * dx,
            self.y + share * dy,
            (self.xx + other.xx).baddbmm_(dx[:, :, None], dx[:, None, :], alpha=weight),
            (self.yx + other.yx).baddbmm_(dy[:, :, None], dx[:, None, :], alpha=weight),
            self.yy + other.yy + weight * dy.square(),
        )


def moments(x: Tensor, y: Tensor) -> Moments:
    """Of rows x (g, n, d) and y (g, n, o)."""
    x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
    near_x, near_y = x.mean(1), y.mean(1)
    x, y = x - near_x[:, None], y - near_y[:, None]
    # A mean in the type of the rows is a little off (and in float64 it would take longer than the products); the rest comes off the sums.
    dx, dy, count = x.mean(1).double(), y.mean(1).double(), x.shape[1]
    squares = inner(x[0].T)[None] if len(x) == 1 else x.transpose(1, 2) @ x
    xx = squares.double() - count * dx[:, :, None] * dx[:, None, :]
    yx = (y.transpose(1, 2) @ x).double() - count * dy[:, :, None] * dx[:, None, :]
    return Moments(count, near_x.double() + dx, near_y.double() + dy, xx, yx, y.square().sum(1).double() - count * dy.square())
