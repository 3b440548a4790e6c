"""Scores from activation statistics: sums over batches of what the consumers of a unit read. No labels, no gradients."""

from __future__ import annotations

import torch

from ..errors import UnknownName
from .fold import lacking
from .registry import scorer
from .seen import Place, observe, observe_samples, places
from .task import Scores, Task

Tensor = torch.Tensor


def by_position(tensor: Tensor, dim: int) -> Tensor:
    """(positions along ``dim``, everything else), in float32 at least."""
    rows = tensor.movedim(dim, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
    return rows if rows.dtype == torch.float64 else rows.float()


class Moments:
    """Streaming count, mean and sum of squared deviations of every position of an activation.

    Batches are merged by the exact formula of Chan et al. 1979, so the variance equals the two-pass one. Within a batch
    deviations are taken from its own mean, so nothing cancels in float32; sums over batches are float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.spread: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        count, mean = rows.shape[1], rows.mean(1)
        spread = (rows - mean[:, None]).square_().sum(1).double()
        mean = mean.double()
        step = mean - self.mean
        total = self.count + count
        self.spread = self.spread + spread + step.square() * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        return self.spread / self.count

    @property
    def second(self) -> Tensor:
        return self.variance + self.mean.square()


def _filled(task: Task, every: list[list[Place]], sums: list[Tensor], otherwise: str | None, name: str) -> Scores:
    found = [total if mine else None for mine, total in zip(every, sums, strict=True)]
    return lacking(task, found, otherwise, name, "an activation that shows the units")


def _averaged(task: Task, measure, otherwise: str | None, name: str) -> Scores:
    """The mean of ``measure(tensor)`` over all entries that belong to a unit, in all places and batches."""
    every = places(task)
    sums = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups]
    counts = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups]

    def see(place: Place, tensor: Tensor) -> None:
        rows = tensor.movedim(place.dim, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
        size = len(sums[place.group])
        sums[place.group] += place.by_unit(measure(rows).sum(1, dtype=torch.float64), size)
        counts[place.group] += place.by_unit(torch.full((len(rows),), float(rows.shape[1])), size)

    observe(task, every, see)
    return _filled(task, every, [s / c.clamp(min=1) for s, c in zip(sums, counts, strict=True)], otherwise, name)


@scorer("activation", "how rarely the activation is zero", "Hu et al. 2016 (APoZ)", needs="inputs", cost="one forward pass")
def apoz(task: Task, otherwise: str | None = None) -> Scores:
    """``1 − APoZ``: the share of entries that are not zero, over all samples and positions (after a ReLU)."""
    return _averaged(task, lambda rows: rows != 0, otherwise, "apoz")


@scorer("activation", "mean absolute activation", "Molchanov et al. 2017; Muralidharan et al. 2024", needs="inputs", cost="one forward pass")
def activation(task: Task, form: str = "abs", otherwise: str | None = None) -> Scores:
    """``E|a|``; ``form="signed"``: ``E[a]``; ``form="l2"``: the Euclidean norm over a sample's positions, averaged over the samples."""
    if form == "l2":
        return _sample_norms(task, otherwise)
    if form not in ("abs", "signed"):
        raise UnknownName(f"form is {form!r}; it is 'abs', 'signed' or 'l2'")
    return _averaged(task, torch.abs if form == "abs" else lambda rows: rows, otherwise, "activation")


def _sample_norms(task: Task, otherwise: str | None) -> Scores:
    every = places(task)
    sums = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups]

    def see(place: Place, parts: Tensor) -> None:
        sums[place.group] += place.by_unit(parts.double().square().sum(2), len(sums[place.group])).sqrt().sum(0)

    count = observe_samples(task, every, see)
    return _filled(task, every, [total / count for total in sums], otherwise, "activation")


def _weighted(task: Task, statistic: str, otherwise: str | None, name: str) -> Scores:
    """``Σ_consumers Σ_positions statistic(X_p) ‖W_p‖²`` for every unit."""
    every = places(task)
    moments = {id(place): Moments() for mine in every for place in mine}
    observe(task, every, lambda place, tensor: moments[id(place)].add(by_position(tensor, place.dim)))
    found: list[Tensor | None] = []
    for group, mine in zip(task.groups, every, strict=True):
        total, weighed = torch.zeros(group.size, dtype=torch.float64), False
        for place in mine:
            seen = getattr(moments[id(place)], statistic).cpu()
            for link in place.readers:
                if link.leaf not in task.parameters:
                    continue
                weight = task.parameters[link.leaf].detach().movedim(link.axis, 0)
                sizes = weight.double().flatten(1).square().sum(1).cpu() if weight.ndim > 1 else weight.double().square().cpu()
                total, weighed = total + _pair(place, seen, torch.from_numpy(link.units), sizes, group.size), True
        found.append(total if weighed else None)
    return lacking(task, found, otherwise, name, "a weight that reads the units")


def _pair(place: Place, seen: Tensor, units: Tensor, sizes: Tensor, size: int) -> Tensor:
    """Position by position where weight and activation have the same ones; else mean activation by unit times all weights of the unit."""
    if torch.equal(units, place.along):
        return place.by_unit(seen * sizes, size)
    mean = place.by_unit(seen, size) / place.by_unit(torch.ones(len(seen)), size).clamp(min=1)
    return mean * torch.zeros(size, dtype=torch.float64).index_add_(0, units[units >= 0], sizes[units >= 0])


@scorer(
    "activation", "norm of the reading weights times norm of what they read", "Sun et al. 2024 (Wanda); An et al. 2024", needs="inputs", cost="one forward pass"
)
def wanda_sp(task: Task, otherwise: str | None = None) -> Scores:
    """``‖W_c‖₂ · sqrt(E[X_c²])``, over several consumers the root of the summed squares."""
    return [total.sqrt() for total in _weighted(task, "second", otherwise, "wanda_sp")]


@scorer(
    "activation",
    "fluctuation of the activation times squared reading weights, standardised",
    "An et al. 2024 (FLAP)",
    needs="inputs",
    cost="one forward pass",
    default={"normalise": "standardise"},
)
def flap(task: Task, otherwise: str | None = None) -> Scores:
    """``Var(X_c) · ‖W_c‖²``: the error that stays when a bias takes over the mean of a removed channel (WIFV).

    Standardised within each group, as the paper does before it ranks all layers together (``normalise="none"`` leaves it out).
    """
    return _weighted(task, "variance", otherwise, "flap")


@scorer("activation", "entropy of the pooled activation over the data", "Luo and Wu 2017", needs="inputs", cost="two forward passes")
def entropy(task: Task, bins: int = 32, otherwise: str | None = None) -> Scores:
    """``−Σ_b p_b log p_b`` of each unit's mean activation per sample, in ``bins`` equal bins between its extremes; places are added."""
    task.data.twice()
    every = places(task)
    low: dict[int, Tensor] = {}
    high: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}

    def pooled(place: Place, parts: Tensor) -> Tensor:
        size = task.groups.groups[place.group].size
        return place.by_unit(parts.double().mean(2), size)

    def extremes(place: Place, parts: Tensor) -> None:
        means, key = pooled(place, parts), id(place)
        low[key] = torch.minimum(low[key], means.amin(0)) if key in low else means.amin(0)
        high[key] = torch.maximum(high[key], means.amax(0)) if key in high else means.amax(0)

    def count(place: Place, parts: Tensor) -> None:
        means, key = pooled(place, parts), id(place)
        width = (high[key] - low[key]).clamp(min=torch.finfo(torch.float64).tiny)
        at = ((means - low[key]) / width * bins).long().clamp(0, bins - 1)
        counts.setdefault(key, torch.zeros(means.shape[1], bins, dtype=torch.float64)).scatter_add_(1, at.T, torch.ones_like(means.T))

    observe_samples(task, every, extremes)
    observe_samples(task, every, count)
    sums = [torch.zeros(group.size, dtype=torch.float64) for group in task.groups]
    for place in (place for mine in every for place in mine):
        share = counts[id(place)] / counts[id(place)].sum(1, keepdim=True)
        sums[place.group] -= torch.special.xlogy(share, share).sum(1)
    return _filled(task, every, sums, otherwise, "entropy")
