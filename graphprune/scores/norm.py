"""Norms of weights: what a unit's slices weigh, without data.

All are read from one pass over the parameters. ``over`` says which slices count ("all", "produces", "consumes",
"passes"), ``reduce`` how the slices of a unit are joined, ``fold`` whether batch norms are folded into their producers first.
"""

from __future__ import annotations

import torch

from ..coupling.sums import unit_sums
from ..errors import UnknownName
from .fold import folded, product_norm
from .registry import scorer
from .task import Scores, Task

REDUCE = {
    "sum": lambda stack: stack.sum(0),
    "mean": lambda stack: stack.mean(0),
    "max": lambda stack: stack.amax(0),
    "prod": lambda stack: stack.prod(0),
}


def joined(task: Task, parts: list[list[torch.Tensor]], reduce: str) -> Scores:
    """Join the slices of every unit; groups without slices score zero."""
    if reduce not in REDUCE:
        raise UnknownName(f"reduce is {reduce!r}; it is one of {', '.join(REDUCE)}")
    return [REDUCE[reduce](torch.stack(p)) if p else torch.zeros(g.size, dtype=torch.float64) for g, p in zip(task.groups, parts, strict=True)]


def powers(task: Task, power: int, over: str, reduce: str, fold: bool) -> Scores:
    """Sums of ``|w| ** power`` over every slice, joined."""
    if over == "all" and reduce == "sum" and not fold and power in (1, 2) and not task.double:
        return unit_sums(task.groups, task.pieces, power)
    weights = folded(task) if fold else task.parameters
    size = (lambda w: w.detach().square()) if power == 2 else (lambda w: w.detach().abs())
    return joined(task, task.slices(weights, over, by=size), reduce)


@scorer("norm", "sum of absolute weights over all coupled slices", "Li et al. 2017", cost="one pass over the weights")
def l1(task: Task, over: str = "all", reduce: str = "sum", fold: bool = False) -> Scores:
    """``Σ |w|`` over all slices of a unit (``reduce`` joins the slices' sums)."""
    return powers(task, 1, over, reduce, fold)


@scorer("norm", "Euclidean norm over all coupled slices", "Li et al. 2017; Fang et al. 2023", cost="one pass over the weights")
def l2(task: Task, over: str = "all", reduce: str = "sum", fold: bool = False) -> Scores:
    """``sqrt(Σ w²)`` over all slices of a unit (``reduce`` joins the slices' squared norms before the root)."""
    return [total.sqrt() for total in powers(task, 2, over, reduce, fold)]


@scorer("norm", "largest absolute weight over all coupled slices", "Li et al. 2017", cost="one pass over the weights")
def linf(task: Task, over: str = "all", reduce: str = "max", fold: bool = False) -> Scores:
    """``max |w|`` over all slices of a unit (``reduce`` joins the slices' maxima)."""
    weights = folded(task) if fold else task.parameters
    return joined(task, task.slices(weights, over, "amax", by=lambda w: w.detach().abs()), reduce)


@scorer("norm", "Euclidean norm of the rows that make a unit", "Li et al. 2017", cost="one pass over the weights")
def filter_norm(task: Task, power: int = 2, fold: bool = False) -> Scores:
    """``‖P_c‖₂`` (``power=2``) or ``‖P_c‖₁`` (``power=1``) of the producers' rows alone."""
    total = powers(task, power, "produces", "sum", fold)
    return [sums.sqrt() for sums in total] if power == 2 else total


@scorer(
    "norm",
    "group norm: mean squared norm of the coupled slices, over the group's mean",
    "Fang et al. 2023 (DepGraph)",
    cost="one pass over the weights",
    default={"normalise": "mean"},
)
def group_norm(task: Task, power: int = 2, reduce: str = "mean", fold: bool = False) -> Scores:
    """``reduce_w ‖w[c]‖_p^p`` over every member slice, divided by the group's mean (or by another of ``normalise``)."""
    return powers(task, power, "all", reduce, fold)


@scorer("norm", "producer norm times consumer norm, batch norm folded in", "rescaling symmetries, e.g. Neyshabur et al. 2015", cost="one pass over the weights")
def product(task: Task) -> Scores:
    """``‖P̃_c‖₂ · ‖W_c‖₂`` with batch norm folded into the producers: the same for every rescaling that keeps the function.

    A group without producers (or without consumers) is scored by the other factor.
    """
    return product_norm(task)


@scorer("norm", "squared norm relative to all units of the group that are at least as large", "Lee et al. 2021 (LAMP)", cost="one pass over the weights")
def lamp(task: Task, over: str = "all", fold: bool = False) -> Scores:
    """Sorted ascending inside a group, ``‖u‖² / Σ_{v ≥ u} ‖v‖²``; the largest unit always scores 1, so no group vanishes.

    Units of equal norm take their places in order, as :func:`select` does: the later one counts as smaller.
    """
    values = []
    for squares in powers(task, 2, over, "sum", fold):
        order = torch.sort(squares, descending=True, stable=True).indices
        above = squares[order].cumsum(0)
        values.append(torch.empty_like(squares).scatter_(0, order, torch.where(above > 0, squares[order] / above, 0.0)))
    return values
