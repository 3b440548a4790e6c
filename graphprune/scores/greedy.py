"""Greedy searches over the units of a quadratic form, in O(C³) for C units: matrices that shrink, in blocks of updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .order import in_order

Tensor = torch.Tensor
BLOCK = 64


class Shrinking:
    """A symmetric matrix under updates ``M −= a bᵀ`` that keep it symmetric; they are collected and carried out many at a time."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.clone()
        self.diagonal = matrix.diagonal().clone()
        self._start()

    def _start(self) -> None:
        self.pending, size = 0, len(self.matrix)
        self.left, self.right = self.matrix.new_empty(BLOCK, size), self.matrix.new_empty(BLOCK, size)

    def column(self, at: int) -> Tensor:
        return self.matrix[at] - self.right[: self.pending, at] @ self.left[: self.pending]

    def subtract(self, left: Tensor, right: Tensor) -> None:
        if self.pending == BLOCK:
            self.settle()
        self.left[self.pending], self.right[self.pending] = left, right
        self.diagonal -= left * right
        self.pending += 1

    def settle(self, keep: Tensor | None = None) -> None:
        """Carry out what is pending, and go on with some of the rows and columns only."""
        self.matrix.addmm_(self.left[: self.pending].T, self.right[: self.pending], alpha=-1)
        if keep is not None:
            self.matrix, self.diagonal = self.matrix[keep][:, keep], self.diagonal[keep]
        self._start()


def surgeon(inverses: Sequence[Tensor], reads: Sequence[Tensor]) -> Tensor:
    """Optimal-brain-surgeon scores of single columns: each removal's loss ``Σ_q [WᵀW]_cc / [H⁻¹]_cc``, W and H⁻¹ downdated in between.

    ``inverses`` are the ``H⁻¹`` and ``reads`` the ``WᵀW`` of every consumer, all (C, C).
    """
    pairs = [(Shrinking(inverse), Shrinking(read)) for inverse, read in zip(inverses, reads, strict=True)]
    units = torch.arange(len(inverses[0]))
    alive = torch.ones(len(units), dtype=torch.bool)
    order, losses, remaining = [], [], len(units)
    while remaining:
        loss = torch.stack([read.diagonal / inverse.diagonal for inverse, read in pairs]).sum(0)
        loss[~alive] = torch.inf
        at = int(loss.argmin())
        order.append(int(units[at]))
        losses.append(float(loss[at]))
        alive[at] = False
        remaining -= 1
        for inverse, read in pairs if remaining else ():
            column, other = inverse.column(at), read.column(at)
            ratio = column / column[at]
            inverse.subtract(column, ratio)
            rest = other - ratio * (other[at] / 2)
            read.subtract(ratio, rest)
            read.subtract(rest, ratio)
        if remaining < 0.8 * len(units) and len(units) > BLOCK:
            for matrix in (matrix for pair in pairs for matrix in pair):
                matrix.settle(alive)
            units, alive = units[alive], torch.ones(remaining, dtype=torch.bool)
    return in_order(order, losses)


def surgeon_in_blocks(inverses: Sequence[Tensor], reads: Sequence[Tensor], blocks: Sequence[Tensor]) -> Tensor:
    """As :func:`surgeon` for units of several columns: ``Σ_q tr(((H⁻¹)_SS)⁻¹ (WᵀW)_SS)``; ``blocks[q]`` is (units, columns of each)."""
    if all(block.shape[1] == 1 for block in blocks):
        at = [block[:, 0] for block in blocks]
        return surgeon([m[i][:, i] for m, i in zip(inverses, at, strict=True)], [m[i][:, i] for m, i in zip(reads, at, strict=True)])
    inverses, reads, blocks = [m.clone() for m in inverses], [m.clone() for m in reads], list(blocks)
    units = torch.arange(len(blocks[0]))
    alive = torch.ones(len(units), dtype=torch.bool)
    order, losses = [], []
    while bool(alive.any()):
        if 2 * int(alive.sum()) <= len(alive):  # go on with what is left only
            for q, block in enumerate(blocks):
                columns = block[alive].flatten()
                inverses[q], reads[q] = (m[columns][:, columns].contiguous() for m in (inverses[q], reads[q]))
                blocks[q] = torch.arange(len(columns)).reshape(-1, block.shape[1])
            units, alive = units[alive], torch.ones(int(alive.sum()), dtype=torch.bool)
        loss = torch.zeros(len(alive), dtype=torch.float64)
        remaining = alive.nonzero().ravel()
        for inverse, read, block in zip(inverses, reads, blocks, strict=True):
            rows, columns = block[remaining][:, :, None], block[remaining][:, None, :]
            solved = torch.linalg.solve(inverse[rows, columns], read[rows, columns])
            loss[remaining] += solved.diagonal(dim1=1, dim2=2).sum(1)
        loss[~alive] = torch.inf
        at = int(loss.argmin())
        order.append(int(units[at]))
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
    return in_order(order, losses)


def smallest_sum(form: Tensor) -> Tensor:
    """ThiNet's greedy: the set T grows by the unit that keeps ``Σ_{j,k ∈ T} Q_jk`` smallest; a unit's score is that sum."""
    sums, squares = torch.zeros(len(form), dtype=torch.float64), form.diagonal()
    total, order, values = 0.0, [], []
    alive = torch.ones(len(form), dtype=torch.bool)
    for _ in range(len(form)):
        grown = total + 2 * sums + squares
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
            matrix.subtract(column, column / column[at])
    return in_order(order[::-1], values[::-1])


class Swept:
    """The tableau of a positive semidefinite matrix Q under sweeps: for the swept set A it holds ``−Q_AA⁻¹``, ``Q_AA⁻¹ Q_AI`` and the Schur complement of I.

    Updates are collected and carried out many at a time; Q is scaled to a diagonal of ones inside, so no pivot is large.
    """

    def __init__(self, form: Tensor) -> None:
        scale = form.diagonal().clamp(min=0).sqrt()
        self.scale = torch.where(scale > 0, scale, 1.0)
        self.matrix = form / torch.outer(self.scale, self.scale)
        self.active = torch.zeros(len(form), dtype=torch.bool)
        self.left, self.right, self.pending = form.new_empty(BLOCK, len(form)), form.new_empty(BLOCK, len(form)), 0

    def column(self, at: int) -> Tensor:
        """The tableau's column, in the scale of Q."""
        diagonal = torch.where(self.active, 1 / self.scale, self.scale)
        return self._column(at) * diagonal * diagonal[at]

    def _column(self, at: int) -> Tensor:
        return self.matrix[at] - self.right[: self.pending, at] @ self.left[: self.pending]

    def sweep(self, at: int) -> bool:
        """Take ``at`` into the swept set; False (and nothing done) where it depends on the set."""
        column = self._column(at)
        if float(column[at]) <= 1e-13:
            return False
        self._turn(at, column, 1)
        return True

    def unsweep(self, at: int) -> None:
        """Take ``at`` out of the swept set again."""
        self._turn(at, self._column(at), -1)

    def _turn(self, at: int, column: Tensor, sign: int) -> None:
        pivot = float(column[at])
        column[at] = pivot - sign  # then row and column become ± column / pivot, up to the diagonal
        self.left[self.pending], self.right[self.pending] = column, column / pivot
        self.pending += 1
        self.matrix[at, at] -= 2 * sign  # ± 2 − 1 / p becomes −1 / p
        self.active[at] = sign > 0
        if self.pending == BLOCK:
            self.settle()

    def settle(self) -> None:
        self.matrix.addmm_(self.left[: self.pending].T, self.right[: self.pending], alpha=-1)
        self.pending = 0

    def times(self, vector: Tensor) -> Tensor:
        """The tableau, in the scale of Q, times a vector."""
        self.settle()
        diagonal = torch.where(self.active, 1 / self.scale, self.scale)
        return diagonal * torch.mv(self.matrix, diagonal * vector)


def lasso_entries(form: Tensor, floor: float = 1e-9) -> Tensor:
    """For ``min_β ½ βᵀQβ − 1ᵀQβ + λ‖β‖₁``: the largest λ at which each β is not zero, by following the exact path (homotopy).

    Units that have not entered when λ has fallen to ``floor`` of its start are ranked by their correlation there.
    """
    size, target = len(form), form.sum(1)
    beta, entered = torch.zeros_like(target), torch.zeros_like(target)
    correlation = target.clone()
    level = start = float(correlation.abs().max())
    if start == 0:
        return entered
    table, signs = Swept(form), torch.zeros_like(target)
    joining, leaving = int(correlation.abs().argmax()), -1
    direction, slope, stale = torch.zeros_like(target), torch.zeros_like(target), 0
    for _ in range(8 * size):
        if joining >= 0:
            sign = float(correlation[joining].sign())
            column = table.column(joining)
            if not table.sweep(joining):
                break
            signs[joining] = sign
            entered[joining] = max(float(entered[joining]), level)
            # β moves along Q_AA⁻¹ s: the new unit adds a multiple of its column, and the correlations follow.
            step = (sign - float(slope[joining])) / float(column[joining])
            moved = table.active.clone()
            moved[joining] = False
            direction -= step * torch.where(moved, column, 0.0)
            direction[joining] = step
            slope = torch.where(table.active, signs, slope + step * column)
            stale += 1
        if leaving >= 0 or stale >= BLOCK:  # once in a while from the tableau itself
            product = table.times(signs)
            direction, slope, stale = torch.where(table.active, -product, 0.0), torch.where(table.active, signs, product), 0
            correlation = target - form @ beta
        step, joining, leaving = _next(correlation, slope, beta, direction, level, table.active, leaving)
        beta += step * direction
        level -= step
        correlation = torch.where(table.active, signs * level, correlation - step * slope)
        if level <= floor * start or (joining < 0 and leaving < 0):
            break
        if leaving >= 0:
            beta[leaving] = signs[leaving] = 0.0
            table.unsweep(leaving)
            if not bool(table.active.any()):
                break
    rest = entered == 0
    entered[rest] = min(level, floor * start) * correlation[rest].abs() / correlation.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return entered


def _next(correlation: Tensor, slope: Tensor, beta: Tensor, direction: Tensor, level: float, active: Tensor, dropped: int) -> tuple[float, int, int]:
    """How far λ may fall until a unit enters or leaves."""
    gaps = torch.stack([(level - correlation) / (1 - slope), (level + correlation) / (1 + slope)])
    zeros = torch.where(active & (beta * direction < 0), -beta / direction, torch.inf)
    gaps[:, active] = torch.inf
    if dropped >= 0:  # it sits on the boundary: only the other sign can be met again at once
        gaps[:, dropped] = torch.where(gaps[:, dropped] > 1e-12 * level, gaps[:, dropped], torch.inf)
    gaps[~(gaps > 0)] = torch.inf
    entry, exit_ = float(gaps.min()), float(zeros.min())
    step = min(entry, exit_, level)
    if step == exit_ and exit_ <= level:
        return step, -1, int(zeros.argmin())
    return (step, int(gaps.amin(0).argmin()), -1) if step == entry else (step, -1, -1)
