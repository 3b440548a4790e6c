"""Scores from the error that the next layer makes without a unit: quadratic forms of Gram matrices of what it reads.

The consumer's weight W is taken as (outputs x kernel taps, units) and its input as X (units, samples x space): taps count
as outputs, so one C x C Gram matrix ``G = X Xᵀ / N`` serves all of them, instead of a (C·kh·kw)² one. For linear layers and
1 x 1 kernels this is exact. A unit of several columns (a head) keeps them apart while the whole matrix stays below
``LARGEST``; beyond that its columns count as further positions. Of a large map a fixed number of random positions is read
(ThiNet and He et al. read 10 an image; here as many as hold ``ENTRIES`` numbers an image), so that the products cost no more than the forward pass.

Up to ``SMALL`` columns everything is computed in double precision. Larger matrices are inverted and downdated in single precision where the damping
keeps their condition far enough below ``1 / eps`` (a test compares the order of removal), and their eigenvectors taken in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from ..coupling.groups import Group
from .fold import lacking
from .greedy import lasso_entries, pivots, smallest_sum, surgeon, surgeon_in_blocks
from .registry import scorer
from .seen import Place, observe, places
from .similar import by_unit
from .stages import by_stage
from .task import Scores, Task
from .waiting import Waiting, inner, sampled

Tensor = torch.Tensor
LARGEST = 4096
MEMORY = 2**28  # bytes of sums over rows up to which those of all groups are taken in one go
ENTRIES = 2**16
SMALL = 1024  # columns up to which everything is decomposed in double precision
WORST = 0.25  # condition over 1 / eps up to which single precision is taken


@dataclass(frozen=True)
class Form:
    """What one activation's readers make of it: the Gram matrix, ``WᵀW``, and the columns of every unit, (units, columns)."""

    gram: Tensor
    reads: Tensor
    columns: Tensor

    def by_unit(self, matrix: Tensor) -> Tensor:
        """A (columns, columns) matrix summed to (units, units)."""
        units, each = self.columns.shape
        flat = self.columns.flatten()
        block = matrix if torch.equal(flat, torch.arange(len(matrix))) else matrix[flat][:, flat]
        return block.reshape(units, each, units, each).sum((1, 3)) if each > 1 else block


def forms(task: Task, centre: bool = False) -> Iterator[tuple[int, list[Form]]]:
    """The number and the quadratic forms of every group, one for each activation that a weight reads; ``centre``: covariances instead of Grams.

    Where all of them would take more than MEMORY, those of one stage are taken at a time (:mod:`graphprune.scores.stages`), in the order of the run, and
    large ones in the type of the activations.
    """
    every = [[p for p in mine if any(r.leaf in task.parameters for r in p.readers)] for mine in places(task)]
    shapes = {id(p): _columns(task.groups.groups[p.group], p) for mine in every for p in mine}
    bytes = [sum((columns.numel() if apart else len(columns)) ** 2 * 4 for columns, apart in (shapes[id(p)] for p in mine)) for mine in every]
    whole = 2 * sum(bytes) <= MEMORY and task.stored is None
    sums: dict[int, Waiting] = {}

    def see(place: Place, tensor: Tensor, count: int) -> None:
        columns, apart = shapes[id(place)]
        rows = sampled(tensor, place.dim, ENTRIES // tensor.shape[place.dim], count)
        rows = rows if torch.equal(columns.flatten(), torch.arange(rows.shape[1])) else rows[:, columns.flatten()]
        if id(place) not in sums:
            sums[id(place)] = Waiting(_sums, torch.float64 if whole or columns.numel() <= SMALL else rows.dtype)
        sums[id(place)].add(rows if apart else rows.reshape(len(rows), *columns.shape).transpose(1, 2).flatten(0, 1))

    def made(index: int) -> tuple[int, list[Form]]:
        totals = [(place, sums.pop(id(place)).total()) for place in every[index]]
        return index, [_form(task, task.groups.groups[index], place, shapes[id(place)], total, centre) for place, total in totals]

    if whole:
        count = [1]
        observe(task, every, lambda place, tensor: see(place, tensor, count[0]), lambda size: count.__setitem__(0, size))
        yield from map(made, range(len(every)))
        return
    yield from ((index, []) for index, mine in enumerate(every) if not mine)
    for groups in by_stage(task, every, bytes, see):
        yield from map(made, groups)


def _sums(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many rows, their sum, and their Gram matrix."""
    return len(rows), rows.sum(0, dtype=torch.float64).cpu(), inner(rows.T).cpu()


def _columns(group: Group, place: Place) -> tuple[Tensor, bool]:
    """The positions of every unit along the activation, (units, positions), and whether they are columns of their own."""
    order = torch.argsort(place.along, stable=True)
    order = order[place.along[order] >= 0]
    counts = torch.bincount(place.along[order], minlength=group.size)
    if not bool((counts == counts[0]).all()):  # uneven: the first positions of each speak for it
        starts = counts.cumsum(0) - counts
        order = torch.cat([order[s : s + int(counts.min())] for s in starts.tolist()])
    columns = order.reshape(group.size, -1)
    aligned = all(torch.equal(torch.from_numpy(link.units), place.along) for link in place.readers)
    return columns, columns.shape[1] == 1 or (aligned and columns.numel() <= LARGEST)


def _form(task: Task, group: Group, place: Place, shape: tuple[Tensor, bool], sums: tuple[int, Tensor, Tensor], centre: bool) -> Form:
    columns, apart = shape
    count, first, second = sums
    gram = second / count - (torch.outer(first, first) / count**2 if centre else 0.0)
    reads = torch.zeros_like(gram)
    for link in place.readers:
        if link.leaf not in task.parameters:
            continue
        weight = task.parameters[link.leaf]
        if apart and len(link.units) == len(place.along):
            rows = (weight.detach().movedim(link.axis, 0).flatten(1) if weight.ndim > 1 else weight.detach()[:, None])[columns.flatten()].double().cpu()
        else:
            rows = by_unit(weight, link.axis, link.units, group.size)
        reads += inner(rows)
    units = torch.arange(columns.numel() if apart else len(columns)).reshape(group.size, -1)
    return Form(gram, reads, units)


def _every(task: Task, compute, otherwise: str | None, name: str, centre: bool = False) -> Scores:
    found = {index: compute(mine) if mine else None for index, mine in task.steps(forms(task, centre))}
    return lacking(task, [found[index] for index in range(len(task.groups))], otherwise, name, "a weight that sums over the units of an activation")


@scorer(
    "reconstruction",
    "loss of the next layer's output after the best refit, greedy",
    "Hassibi and Stork 1993; Kurtic et al. 2023 (ZipLM)",
    needs="inputs",
    cost="a forward pass with Gram matrices, then O(C³) a group",
)
def obs(task: Task, damping: float = 1e-2, centre: bool = False, otherwise: str | None = None) -> Scores:
    """``Σ_q tr(W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ)`` at the moment of removal, ``H = G + damping · mean(diag G) · I``.

    Units go one after the other; after each, W and ``H⁻¹`` are downdated over the rest, so of two equal channels one
    becomes dear when the other is gone. Choosing the lowest k units is the greedy search's first k. ``centre`` judges
    what remains after a bias has taken over the means.
    """
    return _every(task, lambda mine: _surgery(mine, damping), otherwise, "obs", centre)


def _surgery(mine: list[Form], damping: float) -> Tensor:
    inverses, reads = [], []
    for form in mine:
        kind = _precision(len(form.gram), damping)
        hessian = form.gram.to(kind, copy=True)
        hessian.diagonal().add_(damping * float(hessian.diagonal().mean()) or 1.0)
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(hessian)))
        reads.append(form.reads.to(kind))
    if all(form.columns.shape[1] == 1 for form in mine):
        return surgeon(inverses, reads)
    return surgeon_in_blocks(inverses, reads, [form.columns for form in mine])


def _precision(size: int, damping: float) -> torch.dtype:
    """Single precision for a large matrix whose condition the damping bounds (by the trace over the damping), so that it stays below ``1 / eps``."""
    if size <= SMALL or damping <= 0 or size * (1 + damping) / damping * torch.finfo(torch.float32).eps > WORST:
        return torch.float64
    return torch.float32


def _contributions(mine: list[Form]) -> Tensor:
    """``Q_jk = E[⟨y_j, y_k⟩]``, the inner products of what the units contribute to the outputs: ``WᵀW ⊙ G``."""
    return _added(form.by_unit(form.reads * form.gram) for form in mine)


@scorer(
    "reconstruction",
    "smallest output of the removed channels together, greedy",
    "Luo et al. 2017 (ThiNet)",
    needs="inputs",
    cost="a forward pass with Gram matrices, then O(C²) a group",
)
def thinet(task: Task, otherwise: str | None = None) -> Scores:
    """``min_T Σ_i (Σ_{j ∈ T} x̂_ij)²`` grown unit by unit, ``x̂_ij`` what unit j contributes to output i; over all outputs, not samples of them."""
    return _every(task, lambda mine: smallest_sum(_contributions(mine)), otherwise, "thinet")


@scorer(
    "reconstruction",
    "strength of the penalty at which the channel enters",
    "He et al. 2017",
    needs="inputs",
    cost="a forward pass with Gram matrices, then O(C³) a group",
)
def lasso(task: Task, otherwise: str | None = None) -> Scores:
    """For ``min_β ½ E‖Y − Σ β_i X_i W_iᵀ‖² + λ‖β‖₁``, the largest λ at which ``β_c ≠ 0`` (exact path, no grid of λ)."""
    return _every(task, lambda mine: lasso_entries(_contributions(mine)), otherwise, "lasso")


@scorer(
    "reconstruction",
    "weight of the channel in the leading principal directions",
    "Mahoney and Drineas 2009",
    needs="inputs",
    cost="a forward pass with Gram matrices, then O(C³) a group",
)
def leverage(task: Task, energy: float = 0.95, centre: bool = False, otherwise: str | None = None) -> Scores:
    """``[V_k V_kᵀ]_cc`` with the k leading eigenvectors of the Gram matrix that hold ``energy`` of its trace; activations and columns are added."""

    def compute(mine: list[Form]) -> Tensor:
        return _added(form.by_unit(torch.diag(_leverage(form.gram, energy))).diagonal() for form in mine)

    return _every(task, compute, otherwise, "leverage", centre)


def _leverage(gram: Tensor, energy: float) -> Tensor:
    # Of a large matrix single precision is finer than the sample it comes from, and half the work.
    values, vectors = torch.linalg.eigh(gram if len(gram) <= SMALL else gram.float())
    values, vectors = values.double().flip(0).clamp(min=0), vectors.flip(1)
    share = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    count = int((share < energy).sum()) + 1
    return vectors[:, :count].double().square().sum(1)


@scorer(
    "reconstruction",
    "residual of the channel when a pivoted QR picks it",
    "Golub 1965; Chee et al. 2022",
    needs="inputs",
    cost="a forward pass with Gram matrices, then O(C³) a group",
)
def pivoted_qr(task: Task, centre: bool = False, otherwise: str | None = None) -> Scores:
    """``‖x_c − proj(x_c)‖²`` onto the channels picked before, largest first; the columns of a unit count as further samples."""

    def compute(mine: list[Form]) -> Tensor:
        return pivots(_added(_pooled(form) for form in mine))

    return _every(task, compute, otherwise, "pivoted_qr", centre)


def _pooled(form: Form) -> Tensor:
    """The Gram matrix of units whose columns are taken one after the other as samples."""
    return _added(form.gram[column][:, column] for column in form.columns.T)


def _added(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(add, tensors)
