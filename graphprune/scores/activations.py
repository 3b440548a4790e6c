"""Scores from activation statistics: sums over batches of what the consumers of a unit read. No labels, no gradients."""

from __future__ import annotations

import torch

from ..coupling.links import Link
from ..errors import UnknownName
from .fold import lacking
from .registry import scorer
from .seen import Place, observe_samples, places
from .stages import passed
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
        self.mean = self.spread = torch.zeros((), dtype=torch.float64)

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

    passed(task, every, see)
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
    parts = [list(readers.values()) for readers in by_reader(task, statistic)]
    sums = [torch.stack(each).sum(0) if each else None for each in parts]
    return lacking(task, sums, otherwise, name, "a weight that reads the units")


def by_reader(task: Task, statistic: str) -> list[dict[str, Tensor]]:
    """For every group and each weight that reads it, ``Σ_positions statistic(X_p) ‖W_p‖²`` of every unit, (units,).

    What reads the units where the run does not show them (the state inside a recurrent layer) meets what they are on average elsewhere.
    """
    every = places(task)
    moments = {id(place): Moments() for group_places in every for place in group_places}
    passed(task, every, lambda place, tensor: moments[id(place)].add(by_position(tensor, place.dim)))
    sums: list[dict[str, Tensor]] = []
    for group, group_places in zip(task.groups, every, strict=True):
        readers: dict[str, Tensor] = {}
        means = []
        for place in group_places:
            values = getattr(moments[id(place)], statistic).cpu()
            means.append(_by_unit(place, values, group.size))
            for link in place.readers:
                if link.leaf in task.parameters:
                    units = torch.from_numpy(link.units)
                    readers[link.leaf] = readers.get(link.leaf, 0.0) + _pair(place, values, units, _columns(task, link), group.size)
        hidden = [link for link in task.links[group.index] if link.role == "consumes" and link.leaf in task.parameters and link.leaf not in readers]
        for link in hidden if means else ():
            units = torch.from_numpy(link.units)
            columns = torch.zeros(group.size, dtype=torch.float64).index_add_(0, units[units >= 0], _columns(task, link)[units >= 0])
            readers[link.leaf] = torch.stack(means).mean(0) * columns
        sums.append(readers)
    return sums


def _columns(task: Task, link: Link) -> Tensor:
    """The squared norms of a weight's slices along the axis that a link names."""
    weight = task.parameters[link.leaf].detach().movedim(link.axis, 0).double()
    return (weight.flatten(1).square().sum(1) if weight.ndim > 1 else weight.square()).cpu()


def _by_unit(place: Place, values: Tensor, size: int) -> Tensor:
    """The mean of the positions of each unit."""
    return place.by_unit(values, size) / place.by_unit(torch.ones(len(values)), size).clamp(min=1)


def _pair(place: Place, seen: Tensor, units: Tensor, sizes: Tensor, size: int) -> Tensor:
    """Position by position where weight and activation have the same ones; else mean activation by unit times all weights of the unit."""
    if torch.equal(units, place.along):
        return place.by_unit(seen * sizes, size)
    return _by_unit(place, seen, size) * torch.zeros(size, dtype=torch.float64).index_add_(0, units[units >= 0], sizes[units >= 0])


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
)
def flap(task: Task, standardise: bool = True, otherwise: str | None = None) -> Scores:
    """``Var(X_c) · ‖W_c‖²``: the error that stays when a bias takes over the mean of a removed channel (WIFV).

    As in the paper, the *channels* of each group are standardised before all are ranked together, and a unit of several channels (a head) has their mean:
    three heads of 64 channels are three means near 0, not three numbers of variance 1. ``standardise=False`` adds the channels up as they are.
    """
    if not standardise:
        return _weighted(task, "variance", otherwise, "flap")
    every = places(task)
    moments = {id(place): Moments() for group_places in every for place in group_places}
    passed(task, every, lambda place, tensor: moments[id(place)].add(by_position(tensor, place.dim)))
    scores: list[Tensor | None] = []
    for group, group_places in zip(task.groups, every, strict=True):
        channels: dict[bytes, tuple[Tensor, Tensor]] = {}  # by the unit of each channel: those units, and the sum over the weights that read them so
        for place in group_places:
            for link in place.readers:
                if link.leaf in task.parameters:
                    units, values = _channels(task, place, link, moments[id(place)].variance.cpu(), group.size)
                    known = channels.get(units.numpy().tobytes())
                    channels[units.numpy().tobytes()] = units, values if known is None else known[1] + values
        scores.append(_standard_means(list(channels.values()), group.size) if channels else None)
    return lacking(task, scores, otherwise, "flap", "a weight that reads the units")


def _channels(task: Task, place: Place, link: Link, variance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The unit of each channel, and its fluctuation times the squared weights that read it."""
    units, columns = torch.from_numpy(link.units), _columns(task, link)
    if torch.equal(units, place.along):
        return units[units >= 0], (variance * columns)[units >= 0]
    return torch.arange(size), _pair(place, variance, units, columns, size)


def _standard_means(channels: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """The mean over each unit's channels once all channels are standardised.

    >>> _standard_means([(torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 3.0, 1.0, 3.0]))], 2).tolist()
    [0.0, 0.0]
    """
    units, values = torch.cat([each for each, _ in channels]), torch.cat([each for _, each in channels]).double()
    spread = values.std(correction=0)
    values = (values - values.mean()) / spread if spread > 0 else values - values.mean()
    zeros = torch.zeros(size, dtype=torch.float64)
    return zeros.index_add(0, units, values) / zeros.index_add(0, units, torch.ones_like(values)).clamp(min=1)


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
