"""Second moments of activations as sums over rows: which rows of a tensor are taken, and how they are added up.

A product of few rows costs as much as writing its large result, whatever the number of rows; so rows wait until they are as many as
their columns, and the work by batch is that of reading, however small the batches are.

>>> gathered = Waiting(lambda rows: (len(rows), rows.T @ rows))
>>> for _ in range(5):
...     gathered.add(torch.ones(1, 3))
>>> gathered.total()[0], gathered.total()[1].tolist()[0]
(5, [5.0, 5.0, 5.0])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
BLOCK = 256
MOST = 2048


def sampled(tensor: Tensor, dim: int, each: int, count: int) -> Tensor:
    """Rows (n, positions along ``dim``) in float32 at least; of a large map ``each`` random ones for each of ``count`` samples.

    >>> sampled(torch.arange(24.0).reshape(2, 3, 4), 1, 4, 2)[1].tolist()
    [1.0, 5.0, 9.0]
    >>> sampled(torch.zeros(2, 3, 4), 1, 3, 2).shape
    torch.Size([6, 3])
    """
    moved = tensor.movedim(dim, -1) if tensor.ndim > 1 else tensor[None]
    every, most = math.prod(moved.shape[:-1]), max(1, each) * max(1, count)
    if tensor.ndim > 2 and every > most:
        at = torch.randperm(every, device=tensor.device)[:most].sort().values
        rows = moved[torch.unravel_index(at, moved.shape[:-1])]  # before anything is moved: a copy of the whole map costs more than the product
    else:
        rows = moved.reshape(every, -1)
    return rows if rows.dtype == torch.float64 else rows.float()


def inner(rows: Tensor) -> Tensor:
    """``rows @ rows.T``; of a large one what lies below the diagonal is copied from above, block by block.

    >>> rows = torch.arange(6.0).reshape(3, 2)
    >>> torch.equal(inner(rows), rows @ rows.T)
    True
    """
    if len(rows) <= BLOCK:
        return rows @ rows.T
    found = rows.new_empty(len(rows), len(rows))
    for at in range(0, len(rows), BLOCK):
        end = at + BLOCK
        part = rows[at:end] @ rows[at:].T
        found[at:end, at:] = part
        found[end:, at:end] = part[:, BLOCK:].T
    return found


class Waiting:
    """Copies of rows that wait, at most as many as their columns and MOST; ``add_up`` makes of rows a tuple of what can be added up.

    Matrices are added up in ``kind``; what else there is, in float64.
    """

    def __init__(self, add_up: Callable[[Tensor], tuple[Any, ...]], kind: torch.dtype = torch.float64) -> None:
        self.add_up, self.found, self.kind = add_up, (), kind
        self.rows, self.count = torch.empty(0), 0

    def add(self, rows: Tensor) -> None:
        most = min(rows.shape[1], MOST)
        if self.count + len(rows) > most:
            self.settle()
        if len(rows) >= most or not self.found:
            self._take(rows)
            return
        if not self.rows.numel():
            self.rows = torch.empty(most, rows.shape[1], dtype=rows.dtype, device=rows.device)
        self.rows[self.count : self.count + len(rows)] = rows  # a copy: the model may write over its activations
        self.count += len(rows)

    def settle(self) -> None:
        if self.count:
            self._take(self.rows[: self.count])
        self.count = 0

    def _take(self, rows: Tensor) -> None:
        part = self.add_up(rows)
        if not self.found:
            self.found = tuple(p.to(self.kind if p.ndim > 1 else torch.float64) if isinstance(p, Tensor) else p for p in part)
        else:
            self.found = tuple(f.add_(p) if isinstance(f, Tensor) else f + p for f, p in zip(self.found, part, strict=True))

    def total(self) -> tuple[Any, ...]:
        """The sums over all rows so far."""
        self.settle()
        self.rows = torch.empty(0)
        return self.found
