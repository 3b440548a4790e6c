"""Repair without data: what the removed channels said is told by the kept ones, as far as the network's own statistics know.

For a weight that reads channels K and P and loses P, ``W_K + W_P Bᵀ`` with ``B`` the regression of P on K under
:mod:`~graphprune.repair.belief`, and ``W_P (μ_P − Bᵀ μ_K)`` goes to the bias (bias folding: Nagel et al. 2019). The ridge pulls ``B``
towards the one most similar channel with its regression factor (neuron merging: Kim et al. 2020), so an exact duplicate is merged without
loss. What variance is lost all the same is made up in the batch norm behind, and in the scale of norms over a cut stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cutting.plan import Plan
from ..tracing.graph import Graph
from ..tracing.probe import batch_inputs, watch
from ..tracing.trees import leaf_tensors
from .belief import Belief, beliefs, carried
from .fitting import Repaired, idle
from .rows import chosen, outputs, read
from .sites import Site, sites

Tensor = torch.Tensor
STEPS = ("merge", "fold", "rescale")
RIDGE = 0.02
TINY = torch.finfo(torch.float64).tiny
ROWS = 4096


@dataclass(frozen=True)
class _Offer:
    """What a site would get: its weight over the kept columns (outputs, kept, taps), what is added to its outputs, and their variance over the old."""

    site: Site
    kernel: tuple[int, ...]
    old: Tensor
    kept: Tensor
    gone: Tensor
    new: Tensor
    shift: Tensor
    ratio: Tensor
    before: float
    after: float


def repair_free(original: nn.Module, small: nn.Module, graph: Graph, plan: Plan, steps: Sequence[str], checks: Sequence[Any] = ()) -> list[Repaired]:
    """Set the weights of ``small`` from what the original's own statistics say; ``steps``: of "merge", "fold", "rescale".

    Errors are believed ones; with ``checks`` (batches) they are measured, and what does worse there is not done.
    """
    wide, tight = ({name: t.detach() for name, _, _, t in leaf_tensors(model)} for model in (original, small))
    places = [site for site in sites(graph)[0] if plan.cuts.get(site.weight, {}).get(1 - site.axis) is not None and site.weight in tight]
    known = beliefs(graph, wide, {id(site.x) for site in places})
    name = "data-free" if set(steps) == set(STEPS) else " and ".join(steps)
    done: list[Repaired] = []
    offers: list[_Offer] = []
    for site in places:
        offer = _offered(site, wide[site.weight], plan, known.get(id(site.x)), steps)
        if isinstance(offer, _Offer):
            offers.append(offer)
        else:
            done.append(idle("left", f"{site.weight}: {offer}"))
    errors = _measured(original, graph, offers, checks) if checks else [(o.before, o.after) for o in offers]
    for offer, (before, after) in zip(offers, errors, strict=True):
        done.append(Repaired(name, offer.site.weight, before, after, after <= before))
        if after <= before:
            _put(offer, tight, "rescale" in steps)
    return done + (_streams(graph, known, tight, plan, name) if "rescale" in steps else [])


def _offered(site: Site, weight: Tensor, plan: Plan, belief: Belief | None, steps: Sequence[str]) -> _Offer | str:
    """What a site would get, or why it gets nothing."""
    if site.more is not None:  # how many taps reach an output depends on where it stands
        return "a transposed convolution needs data"
    kernel = () if site.shape is None else tuple(weight.shape[2:])
    kept: list[int] | None = plan.cuts[site.weight][1 - site.axis]
    rows = _rows(weight, site, plan)
    if belief is not None and belief.each > 1 and rows.shape[1] == len(belief.mean) * belief.each:
        rows = rows.reshape(len(rows), -1, belief.each)
        kept = _channels(kept, belief.each)
    if belief is None or kept is None or len(belief.mean) != rows.shape[1]:
        return "nothing is known of what it reads"
    return _offer(site, kernel, rows, belief, torch.tensor(kept), steps)


def _channels(kept: Sequence[int], each: int) -> list[int] | None:
    """The channels that stay, where each has so many neighbouring inputs and stays with all of them; else None."""
    channels = [at // each for at in kept[::each]]
    return channels if list(kept) == [channel * each + i for channel in channels for i in range(each)] else None


def merged(belief: Belief, kept: Tensor, gone: Tensor, ridge: float = RIDGE) -> Tensor:
    """B (K, P): each removed channel as a sum of kept ones.

    >>> twin = Belief(torch.zeros(3), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]).double(), 0)
    >>> merged(twin, torch.tensor([0, 1]), torch.tensor([2])).ravel().tolist()
    [1.0, 0.0]
    """
    cov, cross = belief.cov[kept][:, kept], belief.cov[kept][:, gone]
    nearest = belief.correlation[kept][:, gone].abs().argmax(0)
    columns = torch.arange(len(gone))
    one = torch.zeros_like(cross)
    one[nearest, columns] = cross[nearest, columns] / cov.diagonal()[nearest].clamp(min=TINY)
    damp = ridge * cov.diagonal().mean().clamp(min=TINY)
    return torch.linalg.solve(cov + damp * torch.eye(len(kept), dtype=cov.dtype), cross + damp * one)


def _rows(weight: Tensor, site: Site, plan: Plan) -> Tensor:
    """The weight as (outputs that are left, all inputs, taps)."""
    weight = weight.double().cpu()
    weight = site.by_output(weight)
    weight = weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]
    outs = plan.cuts.get(site.weight, {}).get(site.axis)
    return weight if outs is None else weight[torch.tensor(outs)]


def _offer(site: Site, kernel: tuple[int, ...], weight: Tensor, belief: Belief, kept: Tensor, steps: Sequence[str]) -> _Offer:
    gone = torch.tensor(sorted(set(range(weight.shape[1])) - set(kept.tolist())))
    cross = belief.cov[kept][:, gone]
    blend = merged(belief, kept, gone) if "merge" in steps else torch.zeros_like(cross)
    inner, lost = (Belief(belief.mean[at], belief.cov[at][:, at], belief.axis) for at in (kept, gone))
    rest = lost.cov - blend.T @ cross - cross.T @ blend + blend.T @ inner.cov @ blend
    missing = Belief(lost.mean - blend.T @ inner.mean, rest, belief.axis)
    new = weight[:, kept] + torch.einsum("opt,kp->okt", weight[:, gone], blend)
    whole = carried(weight, belief)[1].diagonal().clamp(min=TINY)
    (slip, spread), (shift, remains) = carried(weight[:, gone], lost), carried(weight[:, gone], missing)
    before = float((slip.square() + spread.diagonal()).sum() / whole.sum())
    after = float(remains.diagonal().clamp(min=0).sum() / whole.sum())
    if "fold" not in steps or (site.bias is None and site.norm is None):
        after += float(shift.square().sum() / whole.sum())
        shift = torch.zeros_like(shift)
    return _Offer(site, kernel, weight, kept, gone, new, shift, carried(new, inner)[1].diagonal() / whole, before, after)


def _put(offer: _Offer, tight: Mapping[str, Tensor], rescale: bool) -> None:
    site = offer.site
    by_output = site.by_output(tight[site.weight])
    by_output.copy_(offer.new.reshape(by_output.shape))
    if site.norm is not None:
        tight[site.norm.mean].sub_(offer.shift.to(tight[site.norm.mean]))
        if rescale:
            # what the kept channels cannot say is missing in the variance too; the norm would show the rest too small
            tight[site.norm.var].mul_(offer.ratio.clamp(0.01, 4).to(tight[site.norm.var]))
    elif site.bias is not None:
        tight[site.bias].add_(offer.shift.to(tight[site.bias]))


def _measured(original: nn.Module, graph: Graph, offers: list[_Offer], checks: Sequence[Any]) -> list[tuple[float, float]]:
    """Mean squared error before and after at each site's output over its variance, on the original's own activations."""
    sums = torch.zeros(len(offers), 4, dtype=torch.float64)
    readers: dict[int, list[int]] = {}
    for at, offer in enumerate(offers):
        readers.setdefault(id(offer.site.x), []).append(at)

    def see(value: Any, tensor: Tensor) -> None:
        for at in readers[id(value)]:
            sums[at] += _errors(offers[at], tensor.detach())

    with torch.no_grad(), watch(original, graph, {id(o.site.x): o.site.x for o in offers}.values(), see):
        for batch in checks:
            args, kwargs = batch_inputs(batch)
            original(*args, **kwargs)
    spread = (sums[:, 2] - sums[:, 3]).clamp(min=TINY)
    return [(float(b / s), float(a / s)) for b, a, s in zip(sums[:, 0], sums[:, 1], spread, strict=True)]


def _errors(offer: _Offer, x: Tensor) -> Tensor:
    """Squared errors before and after, and of the outputs their squares and their means' squares, summed over rows and outputs."""
    site, kernel = offer.site, offer.kernel
    every = math.prod(x.shape[:-1]) if site.shape is None else math.prod(outputs(site, tuple(x.shape), kernel))
    at = chosen(site, every, ROWS / (every if site.shape is None else every * len(x)), 4)
    rows = read(site, x, kernel, at)[0].double().cpu().reshape(-1, *offer.old.shape[1:])
    whole = torch.einsum("nit,oit->no", rows, offer.old)
    cut = whole - torch.einsum("nkt,okt->no", rows[:, offer.kept], offer.old[:, offer.kept])
    fit = whole - torch.einsum("nkt,okt->no", rows[:, offer.kept], offer.new) - offer.shift
    return torch.stack([cut.square().sum(), fit.square().sum(), whole.square().sum(), len(whole) * whole.mean(0).square().sum()])


def _streams(graph: Graph, known: Mapping[int, Belief], tight: Mapping[str, Tensor], plan: Plan, step: str) -> list[Repaired]:
    """A norm over a cut stream divides by the size of the rest: its scale times ``sqrt(D/D′ · share of the energy that is left)``."""
    done = []
    for name, leaf in graph.leaves.items():
        kept = plan.cuts.get(name, {}).get(0)
        if kept is None or len(leaf.shape) != 1 or name not in tight:
            continue
        energy = next((b.energy for b in _scaled_by(graph, known, leaf) if b.energy is not None and len(b.energy) == leaf.shape[0]), None)
        if energy is None:
            continue
        share = float(energy[torch.tensor(kept)].mean() / energy.mean().clamp(min=TINY)) ** 0.5
        tight[name].mul_(share)
        done.append(Repaired(step, f"{name} (scale behind a norm of the stream)", abs(1 / share - 1), 0.0, True))
    return done


def _scaled_by(graph: Graph, known: Mapping[int, Belief], leaf: Any) -> list[Belief]:
    """What is known of the results of norms that take this scale."""
    factors = []
    for node in graph.nodes:
        norm = node.norm
        scales = [norm.weight] if norm is not None and norm.kind == "layer" else node.held if node.op.arithmetic == "mul" else []
        if any(value is leaf for value in scales) and id(node.outs[0]) in known:
            factors.append(known[id(node.outs[0])])
    return factors
