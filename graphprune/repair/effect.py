"""A score made for repair: what the removal of a unit costs at the model's output once the weights behind it are refitted.

The optimal brain surgeon's loss of a layer, ``tr(B W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ)``, with ``H`` the covariance of what the layer reads (all taps of a
kernel apart where affordable) and ``B = E[g gᵀ]`` that of the gradient of a random projection of the outputs, so that it is the squared
change of the output to first order (Kronecker factors as in Wang et al. 2019 and van der Ouderaa et al. 2024). No labels are needed, and
units of different layers can be compared: ``per="macs"`` divides by the operations a unit costs, which under ``scope="global"`` gives
each group the width where the next unit's loss per operation is the same.

Of a model that predicts entries of a vocabulary (:mod:`graphprune.repair.predictions`) the gradient is that of the log-likelihood of entries drawn
from its own probabilities, so that it is the divergence of the probabilities.

Two things keep layers comparable. Kronecker factors take the positions of a sample for independent; before a pooling they all push the same
way, so each layer's losses are multiplied by how much more the channels' first-order effects are together than apart. And where samples are
few, the refit is measured on every fourth batch, which it has not seen (:mod:`graphprune.repair.unseen`).

Of many positions a random part is read, the same share of every batch: what is left out would cost more than ``WORK`` of the passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from ..coupling.links import Link
from ..coupling.vocabulary import predicted
from ..errors import BadScore, warn
from ..scores.activations import by_reader
from ..scores.data import samples
from ..scores.fold import lacking
from ..scores.greedy import surgeon_in_blocks
from ..scores.registry import cause, scorer
from ..scores.task import Scores, Task
from ..scores.waiting import Waiting, inner, sampled
from ..tracing.probe import watch
from ..tracing.trees import tensors
from .moments import Moments, moments
from .predictions import drawn, scores
from .rows import chosen, outputs, read
from .sites import Site, sites
from .unseen import Halves, unseen

Tensor = torch.Tensor
LARGEST = 1536  # columns of a Gram matrix; beyond, the taps of a kernel count as outputs, and losses stay as promised
ROWS = 16384
ENTRIES = 2**16  # numbers of each sample that are taken in any case
WORK = 0.15  # how much of the time of the passes the products of either kind may take
EVERY = 4  # of so many batches one is kept out of the fits and tells what they are worth
MEMORY = 2**30  # bytes of matrices that are added up in one pass over the data
ENOUGH = 0.25  # columns per row up to which a Gram matrix is taken at its word


class _Seen:
    """What is added up for a site: moments of the rows it reads, and the second moment of the gradients of what it writes."""

    def __init__(self) -> None:
        self.rows, self.others = (Waiting(lambda rows: (moments(rows[None], rows[None, :, :1]),)) for _ in range(2))
        self.grads = Waiting(lambda rows: (inner(rows.T).cpu(),))
        self.independent = self.together = self.apart = 0.0

    @cached_property
    def data(self) -> Moments | None:
        return next(iter(self.rows.total()), None)

    @cached_property
    def check(self) -> Moments | None:
        return next(iter(self.others.total()), None)

    @property
    def alike(self) -> float:
        """How much more the positions of a sample do together than apart: Kronecker factors take them for independent."""
        return self.together / self.apart if self.apart > 0 else 1.0

    @cached_property
    def second(self) -> Tensor | None:
        return next(iter(self.grads.total()), None)


@scorer(
    "reconstruction",
    "change of the model's output after the best refit, greedy, per operation",
    "optimal brain surgeon with Kronecker factors: Wang et al. 2019 (EigenDamage), van der Ouderaa et al. 2024 (LLM Surgeon)",
    needs="inputs",
    cost="a forward and a backward pass with Gram matrices of kernel taps, then O(C³) a group",
)
def effect(task: Task, per: str = "macs", damping: float = 1e-4, otherwise: str | None = None) -> Scores:
    """``Σ_q tr(B_q W_S ((H_q⁻¹)_SS)⁻¹ W_Sᵀ)`` at the moment of removal, summed over the consumers q of a group; ``per``: "macs" or "unit".

    Consumers that are no single product (the gates of a recurrent layer, a weight used twice) count by what they read times their weights, on the scale
    that measured consumers have; a group without any reader by the norm of its weights, on the same scale. ``otherwise`` names a score for groups
    without a measured consumer.
    """
    every = {site.weight: site for site in sites(task.groups.graph)[0]}
    consumers = [[link for link in links if link.role == "consumes" and link.leaf in every] for links in task.links]
    projection = int(torch.randint(2**31, ()))
    measured: list[Tensor | None] = []
    measuring: list[set[str]] = []  # the weights whose loss counts
    for block in _blocks(task, every, consumers):
        seen = _observe(task, every, {link.leaf for index in block for link in consumers[index]}, projection)
        for index in block:
            losses, leaves = _losses(task, every, consumers[index], task.groups.groups[index].size, seen, damping)
            measured.append(losses)
            measuring.append(leaves)
    if otherwise is None:
        losses_of = _with_others(task, measured, measuring)
    else:
        losses_of = lacking(task, measured, otherwise, "effect", "a weight that sums over the units of an activation")
    return [losses / _cost(task, every, group_links) if per == "macs" else losses for losses, group_links in zip(losses_of, task.links, strict=True)]


def _losses(task: Task, every: dict[str, Site], links: list[Link], size: int, seen: dict[str, _Seen], damping: float) -> tuple[Tensor | None, set[str]]:
    """What the removal of each unit costs its consumers, and which those are; None where none could be measured."""
    forms = {
        link.leaf: _form(task, every[link.leaf], seen[link.leaf], torch.from_numpy(link.units), size, damping)
        for link in links
        if seen[link.leaf].data is not None
    }
    parts = {leaf: form for leaf, form in forms.items() if form is not None}
    if not parts:
        return None, set()
    halves = [half for _, half, _ in parts.values()]
    losses = surgeon_in_blocks(
        [inverse for inverse, _, _ in parts.values()], [half.writes.T @ half.writes for half in halves], [half.blocks for half in halves]
    )
    measurable = all(half.check is not None and len(half.fit) <= LARGEST for half in halves)
    if measurable and any(beyond > 0 for _, _, beyond in parts.values()):
        losses = unseen(losses, halves)
    return losses, set(parts)


def _with_others(task: Task, measured: list[Tensor | None], measuring: list[set[str]]) -> Scores:
    """The losses with what unmeasured consumers add: what they read times their weights, squared, as much as that is worth where both are known."""
    consumers = [{link.leaf for link in links if link.role == "consumes" and link.leaf in task.parameters} for links in task.links]
    if all(losses is not None and leaves <= known for losses, leaves, known in zip(measured, consumers, measuring, strict=True)):
        return [losses for losses in measured if losses is not None]
    total = _with_readers(task, measured, measuring)
    norms = [norm.square() for norm in task.by("l2")]
    scale = _ratio(total, norms)
    unread = [group.name for group, losses in zip(task.groups, total, strict=True) if losses is None]
    if unread:
        names = ", ".join(unread[:3]) + (", …" if len(unread) > 3 else "")
        warn(f"the score 'effect' measures no consumer of {len(unread)} of {len(total)} groups ({names}); they are scored by the norms of their weights")
    return [scale * norm if losses is None else losses for losses, norm in zip(total, norms, strict=True)]


def _with_readers(task: Task, measured: list[Tensor | None], measuring: list[set[str]]) -> list[Tensor | None]:
    """The losses and what unmeasured consumers read times their weights; None where a group has no consumer at all."""
    pairs = list(zip(by_reader(task, "second"), measuring, strict=True))
    worth = _ratio(measured, [_added(part for leaf, part in parts.items() if leaf in known) for parts, known in pairs])
    others = [_added(part for leaf, part in parts.items() if leaf not in known) for parts, known in pairs]
    return [_joined(losses, other, worth) for losses, other in zip(measured, others, strict=True)]


def _added(parts: Iterable[Tensor]) -> Tensor | None:
    """The sum; None of nothing."""
    parts = list(parts)
    return torch.stack(parts).sum(0) if parts else None


def _joined(losses: Tensor | None, other: Tensor | None, worth: float) -> Tensor | None:
    return losses if other is None else worth * other if losses is None else losses + worth * other


def _ratio(losses: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> float:
    """How much of one measure the other is worth: the median over the groups that have both, 1 where none has."""
    pairs = [(float(loss.sum()), float(other.sum())) for loss, other in zip(losses, others, strict=True) if loss is not None and other is not None]
    ratios = sorted(loss / other for loss, other in pairs if loss > 0 and other > 0)
    return ratios[len(ratios) // 2] if ratios else 1.0


def _blocks(task: Task, every: dict[str, Site], consumers: list[list[Link]]) -> Iterator[list[int]]:
    """Successive groups whose consumers' matrices fit into MEMORY together (one group at least): a pass over the data for each block."""
    block: list[int] = []
    leaves: set[str] = set()
    for index, links in enumerate(consumers):
        wider = leaves | {link.leaf for link in links}
        if block and wider > leaves and sum(_bytes(every[leaf], task.tensors[leaf]) for leaf in wider) > MEMORY:
            yield block
            block, wider = [], {link.leaf for link in links}
        block.append(index)
        leaves = wider
    yield block


def _bytes(site: Site, weight: Tensor) -> int:
    """What the moments of a consumer's inputs, on two parts of the samples, and of its gradients take, in float64."""
    columns = weight.numel() // weight.shape[site.axis]
    columns = columns if columns <= LARGEST else weight.shape[1 - site.axis]
    return 8 * (2 * columns**2 + min(weight.shape[site.axis], columns if _told(site, weight) else weight.shape[site.axis]) ** 2)


def _observe(task: Task, every: dict[str, Site], wanted: set[str], projection: int) -> dict[str, _Seen]:
    """One forward pass for every batch, and one backward pass through the activations alone; ``projection`` seeds the random projections of outputs."""
    observer, entries = _Observer(task, every, wanted), predicted(task.groups.graph)
    for parameter in task.model.parameters():
        parameter.requires_grad_(False)
    for weight in observer.weights.values():
        weight.requires_grad_(True)
    for index, batch in enumerate(task.data):
        observer.start(index, batch)
        with torch.inference_mode(False), torch.enable_grad(), watch(task.model, task.groups.graph, observer.values, observer.see):
            outs = [t for t in tensors(task.data.run(batch), Tensor) if t.requires_grad]
            generator = torch.Generator().manual_seed(projection + index)  # the same for every block of groups
            predictions = scores(outs, entries) if entries else None
            if predictions is not None:
                loss = (predictions * drawn(predictions, generator)).sum()
            else:
                centred = [o - o.mean(-1, keepdim=True) if o.ndim > 1 and o.shape[-1] > 1 else o for o in outs]
                ways = [torch.randn(o.shape, generator=generator, dtype=o.dtype).to(o.device) for o in centred]
                loss = sum(((o * each).sum() for o, each in zip(centred, ways, strict=True)), torch.zeros(()))
        if not bool(torch.isfinite(loss)):
            raise BadScore(f"the score 'effect' meets an output that is not finite; {cause(task.model)}")
        if outs and observer.first:
            torch.autograd.grad(loss, observer.first, allow_unused=True)
    for moments_of in observer.seen.values():
        if moments_of.second is not None:
            moments_of.second.div_(max(observer.total, 1))
    return observer.seen


class _Observer:
    """What the sites of some weights read, and the gradients of what they write, added up over the batches."""

    def __init__(self, task: Task, every: dict[str, Site], wanted: set[str]) -> None:
        self.seen = {name: _Seen() for name in sorted(wanted)}
        self.weights = {name: task.tensors[name] for name in every}
        self.sites: dict[int, list[Site]] = {}  # by the id of a value that they read or write
        for site in every.values():
            self.sites.setdefault(id(site.x), []).append(site)
            self.sites.setdefault(id(site.y), []).append(site)
        self.values = list({id(value): value for site in every.values() for value in (site.x, site.y)}.values())
        self.total = self.index = self.count = 0  # samples so far, the batch, its samples
        self.first: list[Tensor] = []  # where gradients begin

    def start(self, index: int, batch: Any) -> None:
        self.index, self.count = index, samples(batch)
        self.total += self.count
        self.first = [tensor for tensor in tensors(batch, Tensor) if tensor.requires_grad]

    def see(self, value: object, tensor: Tensor) -> None:
        for site in self.sites[id(value)]:
            if site.x is value and not tensor.requires_grad:  # every gradient passes on its way to a weight of this kind
                self.first.append(self.weights[site.weight])
            if site.weight not in self.seen:
                continue
            if site.x is value:
                self.read(site, tensor)
            if site.y is value and tensor.requires_grad:
                tensor.register_hook(partial(self.passed_back, site, self.count))

    def read(self, site: Site, tensor: Tensor) -> None:
        rows = _rows(site, tensor.detach(), self.weights[site.weight], self.count)
        if rows is None:
            return
        seen = self.seen[site.weight]
        (seen.others if self.index % EVERY == 1 else seen.rows).add(rows)
        seen.independent += _independent(site, tensor.detach(), len(rows))
        if tensor.requires_grad and tensor.shape[0] % self.count == 0:
            tensor.register_hook(partial(_together, seen, site, tensor.detach(), self.count))

    def passed_back(self, site: Site, count: int, gradient: Tensor) -> None:
        self.seen[site.weight].grads.add(_gradients(site, gradient, self.weights[site.weight].detach(), count))


def _each(every: int, count: int, columns: int, cost: float, passes: float) -> int:
    """How many of the positions of each sample are taken, where a product costs so much for each of them and the passes so much.

    At least as many as hold ENTRIES numbers, so that few samples are enough for a matrix; beyond, all that cost a share of the passes.
    """
    return max(ENTRIES // columns, math.ceil(WORK * passes / cost * every / max(count, 1)))


def _rows(site: Site, x: Tensor, weight: Tensor, count: int) -> Tensor | None:
    """Rows that a site reads; None where its input comes in several groups."""
    if site.shape is None:
        every, columns = math.prod(x.shape[:-1]), x.shape[-1]
        return sampled(x, -1, _each(every, count, columns, columns**2 / 2, 3 * weight.numel()), count)
    kernel = tuple(weight.shape[2:])
    if site.by_output(weight).shape[1] != x.shape[1]:
        return None
    every = math.prod(outputs(site, tuple(x.shape), kernel))
    at = chosen(site, every, ROWS / count / every / 4, 4)
    rows = read(site, x, kernel, at)
    if rows.shape[2] > LARGEST:
        taps = math.prod(kernel)
        rows = rows.reshape(rows.shape[1], -1, taps).transpose(1, 2).reshape(1, -1, x.shape[1])
    return rows[0] if rows.dtype == torch.float64 else rows[0].float()


def _independent(site: Site, x: Tensor, count: int) -> float:
    """How many independent rows the rows of a batch are worth: those of one sample resemble each other (design effect, Kish 1965)."""
    rows = x.movedim(1 if site.shape is not None else -1, -1).flatten(1, -2) if x.ndim > 2 else x[:, None]
    each = count / len(rows)
    if len(rows) < 2 or each <= 1:
        return float(count)
    spread = (rows - rows.mean((0, 1))).square().mean((0, 1))
    between = rows.mean(1).var(0, correction=0)
    alike = (between[spread > 0] / spread[spread > 0]).mean().nan_to_num(0.0)  # channel by channel: rescaled ones change nothing
    return count / (1 + (each - 1) * float(alike))


def _together(seen: _Seen, site: Site, x: Tensor, count: int, grad: Tensor) -> None:
    """First-order effect of every channel, squared after and before the sum over the positions of a sample."""
    axis = 1 if site.shape is not None else -1
    x, grad = (t.movedim(axis, -1).reshape(count, -1, t.shape[axis]) for t in (x, grad))
    effect = (x - x.mean((0, 1))) * grad
    seen.together += float(effect.sum(1).square().sum())
    seen.apart += float(effect.square().sum())


def _told(site: Site, weight: Tensor) -> bool:
    """Whether the gradient of what is written is better told by what it says of what is read: ``WᵀBW`` at once, without the wide ``B``."""
    return site.shape is None and weight.shape[site.axis] > 2 * weight.shape[1 - site.axis]


def _gradients(site: Site, grad: Tensor, weight: Tensor, count: int) -> Tensor:
    """Gradients of a site's outputs as rows, scaled so that their products add up to those of all positions."""
    dim = 1 if site.shape is not None else -1
    outs, every = grad.shape[dim], grad.numel() // grad.shape[dim]
    projected = _told(site, weight)
    cost = weight.numel() + (weight.numel() / outs) ** 2 / 2 if projected else outs**2 / 2
    rows = sampled(grad.detach(), dim, _each(every, count, outs, cost, 3 * weight.numel()), count)
    rows = rows * math.sqrt(every / len(rows))
    return rows @ (weight.T if site.turned else weight).to(rows.dtype) if projected else rows


def _form(task: Task, site: Site, seen: _Seen, units: Tensor, size: int, damping: float) -> tuple[Tensor, Halves, float] | None:
    """``H⁻¹``; ``B^½ W``, the columns of each unit and the covariances on both parts of the samples; how far the rows fall short."""
    weight = task.tensors[site.weight].detach().double().cpu()
    weight = site.by_output(weight)
    assert seen.data is not None  # the caller has looked
    columns = seen.data.xx.shape[1]
    flat = weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]  # (outputs, inputs, taps)
    both = seen.second
    if units.numel() != flat.shape[1] or both is None:
        return None
    values, vectors = torch.linalg.eigh(both * seen.alike)
    root, each = values.clamp(min=0).sqrt()[:, None] * vectors.T, 1
    if _told(site, task.tensors[site.weight]):
        writes = root
    elif columns == flat.shape[1] * flat.shape[2]:
        writes, each = root @ flat.flatten(1), flat.shape[2]
    else:
        writes = torch.cat([root @ flat[:, :, tap] for tap in range(flat.shape[2])])
    every = seen.data if seen.check is None else seen.data + seen.check
    hessian = every.xx[0].cpu() / every.count
    # Of fewer rows than columns any column seems to follow from the others; what they cannot tell counts as independent.
    beyond = max(0.0, columns / max(seen.independent, 1.0) - ENOUGH)
    alone = beyond / (1 + beyond)
    hessian = (1 - alone) * hessian + alone * torch.diag(hessian.diagonal())
    scale = hessian.diagonal().mean()
    hessian = hessian + torch.eye(columns, dtype=hessian.dtype) * (damping * scale if scale > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    order = torch.argsort(units, stable=True)
    order = order[units[order] >= 0]
    if len(order) % size:
        return None
    places = order.reshape(size, -1)
    blocks = (places[:, :, None] * each + torch.arange(each)).flatten(1)
    check = None if seen.check is None else seen.check.xx[0].cpu() / seen.check.count
    return inverse, Halves(seen.data.xx[0].cpu() / seen.data.count, check, writes, blocks), beyond


def _cost(task: Task, every: dict[str, Site], consumers: list[Any]) -> float:
    """Multiplications that one unit takes part in."""
    total = 0.0
    for link in consumers:
        site = every.get(link.leaf)
        weight = task.tensors[link.leaf]
        length = weight.shape[link.axis]
        if site is None:
            shape = () if link.value is None or weight.ndim < 2 else link.value.shape
            if shape:  # once for each position of what it reads or makes
                positions = math.prod(shape) / shape[link.dim]
                total += weight.numel() * positions * (link.units >= 0).sum() / length / max(int(link.units.max()) + 1, 1)
            continue
        outs = weight.shape[site.axis]
        there = math.prod(site.y.shape) / outs if site.more is None else math.prod(site.x.shape) / site.x.shape[1]
        total += weight.numel() * there * (link.units >= 0).sum() / length / max(int(link.units.max()) + 1, 1)
    return max(total, 1.0)
