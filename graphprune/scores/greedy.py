"""Greedy searches over the units of a quadratic form, in O(C³) for C units: matrices that shrink, in blocks of updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .order import in_order

Tensor = torch.Tensor
BLOCK = 64


class Shrinking:
    """A symmetric matrix under updates ``M −= a bᵀ + b aᵀ``; they are collected and carried out many at a time."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.clone()
        self.diagonal = matrix.diagonal().clone()
        self._start()

    def _start(self) -> None:
        self.pending, size = 0, len(self.matrix)
        self.left, self.right = self.matrix.new_empty(size, BLOCK), self.matrix.new_empty(size, BLOCK)

    def column(self, at: int) -> Tensor:
        left, right = self.left[:, : self.pending], self.right[:, : self.pending]
        return self.matrix[:, at] - left @ right[at] - right @ left[at]

    def subtract(self, left: Tensor, right: Tensor) -> None:
        self.left[:, self.pending], self.right[:, self.pending] = left, right
        self.diagonal -= 2 * left * right
        self.pending += 1
        if self.pending == BLOCK:
            self.settle()

    def settle(self, keep: Tensor | None = None) -> None:
        """Carry out what is pending, and go on with some of the rows and columns only."""
        product = self.left[:, : self.pending] @ self.right[:, : self.pending].T
        self.matrix -= product + product.T
        if keep is not None:
            self.matrix, self.diagonal = self.matrix[keep][:, keep].contiguous(), self.diagonal[keep]
        self._start()


def surgeon(inverses: Sequence[Tensor], reads: Sequence[Tensor]) -> Tensor:
    """Optimal-brain-surgeon scores of single columns: each removal's loss ``Σ_q [WᵀW]_cc / [H⁻¹]_cc``, W and H⁻¹ downdated in between.

    ``inverses`` are the ``H⁻¹`` and ``reads`` the ``WᵀW`` of every consumer, all (C, C).
    """
    pairs = [(Shrinking(inverse), Shrinking(read)) for inverse, read in zip(inverses, reads, strict=True)]
    units = torch.arange(len(inverses[0]))
    alive = torch.ones(len(units), dtype=torch.bool)
    order, losses = [], []
    for step in range(1, len(units) + 1):
        loss = sum(read.diagonal / inverse.diagonal for inverse, read in pairs)
        loss[~alive] = torch.inf
        at = int(loss.argmin())
        order.append(int(units[at]))
        losses.append(float(loss[at]))
        alive[at] = False
        if not bool(alive.any()):
            break
        for inverse, read in pairs:
            column, other = inverse.column(at), read.column(at)
            ratio = column / column[at]
            inverse.subtract(column / 2, ratio)
            read.subtract(ratio, other - ratio * (other[at] / 2))
        if step % BLOCK == 0:
            for matrix in (matrix for pair in pairs for matrix in pair):
                matrix.settle(alive)
            units, alive = units[alive], torch.ones(int(alive.sum()), dtype=torch.bool)
    return in_order(order, losses)


def surgeon_in_blocks(inverses: Sequence[Tensor], reads: Sequence[Tensor], blocks: Sequence[Tensor]) -> Tensor:
    """As :func:`surgeon` for units of several columns: ``Σ_q tr(((H⁻¹)_SS)⁻¹ (WᵀW)_SS)``; ``blocks[q]`` is (units, columns of each)."""
    inverses, reads = [m.clone() for m in inverses], [m.clone() for m in reads]
    alive = torch.ones(len(blocks[0]), dtype=torch.bool)
    order, losses = [], []
    while bool(alive.any()):
        loss = torch.zeros(len(alive), dtype=torch.float64)
        left = alive.nonzero().ravel()
        for inverse, read, block in zip(inverses, reads, blocks, strict=True):
            rows, columns = block[left][:, :, None], block[left][:, None, :]
            solved = torch.linalg.solve(inverse[rows, columns], read[rows, columns])
            loss[left] += solved.diagonal(dim1=1, dim2=2).sum(1)
        loss[~alive] = torch.inf
        at = int(loss.argmin())
        order.append(at)
        losses.append(float(loss[at]))
        alive[at] = False
        for inverse, read, block in zip(inverses, reads, blocks, strict=True):
            gone = block[at]
            ratio = torch.linalg.solve(inverse[gone][:, gone], inverse[gone]).T
            rows = read[gone]
            inner = rows[:, gone]
            read -= ratio @ rows + rows.T @ ratio.T - ratio @ inner @ ratio.T
            inverse -= ratio @ inverse[gone]
            for matrix in (inverse, read):
                matrix[gone] = matrix[:, gone] = 0
            inverse[gone, gone] = 1
    return in_order(order, losses)


def smallest_sum(form: Tensor) -> Tensor:
    """ThiNet's greedy: the set T grows by the unit that keeps ``Σ_{j,k ∈ T} Q_jk`` smallest; a unit's score is that sum."""
    sums, own = torch.zeros(len(form), dtype=torch.float64), form.diagonal()
    total, order, values = 0.0, [], []
    alive = torch.ones(len(form), dtype=torch.bool)
    for _ in range(len(form)):
        grown = total + 2 * sums + own
        grown[~alive] = torch.inf
        at = int(grown.argmin())
        total = float(grown[at])
        order.append(at)
        values.append(total)
        alive[at] = False
        sums += form[at]
    return in_order(order, values)


def pivots(gram: Tensor) -> Tensor:
    """Pivoted QR of the columns behind a Gram matrix: each unit's score is its squared residual when it is picked, largest first."""
    matrix = Shrinking(gram)
    alive = torch.ones(len(gram), dtype=torch.bool)
    order, values = [], []
    for _ in range(len(gram)):
        residual = matrix.diagonal.clone()
        residual[~alive] = -torch.inf
        at = int(residual.argmax())
        order.append(at)
        values.append(max(float(residual[at]), 0.0))
        alive[at] = False
        column = matrix.column(at)
        if values[-1] > 1e-14 * values[0]:
            matrix.subtract(column / 2, column / column[at])
    return in_order(order[::-1], values[::-1])


def lasso_entries(form: Tensor, floor: float = 1e-9) -> Tensor:
    """For ``min_β ½ βᵀQβ − 1ᵀQβ + λ‖β‖₁``: the largest λ at which each β is not zero, by following the exact path (homotopy).

    Units that have not entered when λ has fallen to ``floor`` of its start are ranked by their correlation there.
    """
    form = form.numpy()
    size = len(form)
    target = form.sum(1)
    beta, correlation = np.zeros(size), target.copy()
    level = start = float(np.abs(correlation).max())
    entered = np.zeros(size)
    if start == 0:
        return torch.from_numpy(entered)
    active: list[int] = []
    inverse = np.zeros((0, 0))
    joining, leaving = int(np.abs(correlation).argmax()), -1
    for _ in range(8 * size):
        if joining >= 0:
            inverse = _bordered(inverse, form[active, joining], form[joining, joining])
            if inverse is None:
                break
            active.append(joining)
            entered[joining] = max(entered[joining], level)
        signs = np.sign(correlation[active])
        if joining >= 0:
            signs[-1] = np.sign(correlation[joining])
        direction = inverse @ signs
        slope = form[:, active] @ direction
        step, joining, leaving = _next(correlation, slope, beta, direction, level, active, leaving)
        beta[active] += step * direction
        level -= step
        correlation = target - form[:, active] @ beta[active]
        if level <= floor * start or (joining < 0 and leaving < 0):
            break
        if leaving >= 0:
            at = active.index(leaving)
            beta[leaving] = 0.0
            inverse = _without(inverse, at)
            del active[at]
            if not active:
                break
    rest = entered == 0
    entered[rest] = min(level, floor * start) * np.abs(correlation[rest]) / max(np.abs(correlation).max(), np.finfo(float).tiny)
    return torch.from_numpy(entered)


def _next(correlation, slope, beta, direction, level: float, active: list[int], dropped: int) -> tuple[float, int, int]:
    """How far λ may fall until a unit enters or leaves."""
    inactive = np.ones(len(beta), dtype=bool)
    inactive[active] = False
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = np.stack([(level - correlation) / (1 - slope), (level + correlation) / (1 + slope)])
        zeros = np.where(beta[active] * direction < 0, -beta[active] / direction, np.inf)
    gaps[:, ~inactive] = np.inf
    if dropped >= 0:  # it sits on the boundary: only the other sign can be met again at once
        gaps[:, dropped] = np.where(gaps[:, dropped] > 1e-12 * level, gaps[:, dropped], np.inf)
    gaps[~(gaps > 0)] = np.inf
    entry, exit_ = float(gaps.min()), float(zeros.min(initial=np.inf))
    step = min(entry, exit_, level)
    if step == exit_ and exit_ <= level:
        return step, -1, active[int(zeros.argmin())]
    return (step, int(gaps.min(0).argmin()), -1) if step == entry else (step, -1, -1)


def _bordered(inverse: np.ndarray, column: np.ndarray, corner: float) -> np.ndarray | None:
    """The inverse after a row and a column are added; None when they depend on the others."""
    along = inverse @ column
    rest = corner - column @ along
    if rest <= 1e-13 * corner:
        return None
    size = len(inverse)
    grown = np.empty((size + 1, size + 1))
    grown[:size, :size] = inverse + np.outer(along, along) / rest
    grown[:size, size] = grown[size, :size] = -along / rest
    grown[size, size] = 1 / rest
    return grown


def _without(inverse: np.ndarray, at: int) -> np.ndarray:
    """The inverse after row and column ``at`` are taken out."""
    keep = np.arange(len(inverse)) != at
    return inverse[keep][:, keep] - np.outer(inverse[keep, at], inverse[at, keep]) / inverse[at, at]
