"""Which entries of which weights go: units of entries, their scores, and an exact choice.

A unit is a single weight, a row or column of a kernel (*vector*; Mao et al. 2017), a kernel (one filter x one input
channel), or the same (channel, tap) in every filter (*group*; Lebedev & Lempitsky 2016). ``n:m`` keeps n of every m
neighbours along the summed axis (Mishra et al. 2021). Counts are exact: ties go by position, later ones first.

>>> chosen = lowest(torch.tensor([3.0, 1.0, 1.0, 2.0]), 2)
>>> chosen.tolist()
[False, True, True, False]
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .errors import BadRatio, BadScore, UnknownName
from .weights import Weight

EntryScorer = Callable[[torch.Tensor], torch.Tensor]
NORMS = ("l1", "l2", "linf")
# Scores of single weights that only an entry-wise criterion knows.
ENTRYWISE = (*NORMS, "random", "taylor", "synaptic", "lamp")


@dataclass(frozen=True)
class Spec:
    """What a granularity asks for: its name, an option after the colon, and n:m."""

    name: str
    option: str = ""
    keep: int = 0
    of: int = 0

    @property
    def coarse(self) -> bool:
        """Are whole axes cut, as the engine's groups say?"""
        return self.name in ("channel", "head")

    @property
    def text(self) -> str:
        """As the user wrote it."""
        return self.option if self.name == "n:m" else f"{self.name}:{self.option}" if self.option else self.name

    @property
    def threshold(self) -> float | None:
        try:
            return float(self.option)
        except ValueError:
            return None


def views(weight: Weight, spec: Spec) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """How a weight is seen as units: the shape to view it in, and the axes inside a unit; None where there are none."""
    shape, rank = weight.shape, len(weight.shape)
    if spec.name == "weight":
        return shape, ()
    if not weight.kernel:
        return None
    if spec.name == "kernel":
        return shape, tuple(range(2, rank))
    if spec.name == "vector":
        return (shape, (rank - 2 if spec.option == "column" else rank - 1,)) if weight.kernel > 1 or spec.option != "column" else None
    if weight.inputs != 1:
        return None  # the filters of a transposed convolution do not share columns
    return (weight.groups, shape[0] // weight.groups, *shape[1:]), (1,)


def unit_scores(
    weight: Weight, view: tuple, data: torch.Tensor, criterion: str | EntryScorer, grad: torch.Tensor | None, gamma: torch.Tensor | None
) -> torch.Tensor:
    """The score of every unit, with length 1 along the axes inside a unit; float64 in, float64 out.

    ``l1``, ``l2``, ``linf``: norm of the unit; ``synaptic``: ``|gamma_c| * ||W_oc||`` (Lin et al. 2018); ``taylor``:
    ``|sum of weight x gradient|`` (Molchanov et al. 2019; SNIP for single weights, Lee et al. 2019); ``lamp``: ``w^2`` over
    the sum of all squares at least as large in the layer (Lee et al. 2021).
    """
    shape, inside = view
    data = data.detach()
    wide = data if data.dtype == torch.float64 else data.float()
    if callable(criterion):
        return _custom(weight, shape, inside, criterion(data))
    if criterion == "random":
        generator = torch.Generator().manual_seed(weight.call)
        return torch.rand([1 if a in inside else n for a, n in enumerate(shape)], generator=generator, dtype=torch.float64)
    if criterion == "taylor":
        product = (wide * grad.to(wide.dtype)).reshape(shape)
        return (product.sum(inside, keepdim=True) if inside else product).abs()
    if criterion == "synaptic" and gamma is not None:
        wide = wide * gamma.to(wide.dtype).abs().reshape([-1 if a == weight.inputs else 1 for a in range(wide.ndim)])
    seen = wide.reshape(shape)
    order = {"l1": 1, "linf": math.inf}.get(criterion, 2)
    norms = torch.linalg.vector_norm(seen, order, inside, keepdim=True) if inside else seen.abs()
    return _lamp(norms) if criterion == "lamp" else norms


def _lamp(norms: torch.Tensor) -> torch.Tensor:
    squares, order = norms.double().square().ravel().sort(stable=True)
    rest = squares.flip(0).cumsum(0).flip(0)
    found = torch.empty_like(squares)
    found[order] = squares / rest.clamp(min=torch.finfo(torch.float64).tiny)
    return found.reshape(norms.shape)


def _custom(weight: Weight, shape: tuple, inside: tuple, found: torch.Tensor) -> torch.Tensor:
    lengths = [1 if a in inside else n for a, n in enumerate(shape)]
    flat = [n for a, n in enumerate(shape) if a not in inside]
    if not isinstance(found, torch.Tensor) or tuple(found.shape) not in (weight.shape, tuple(lengths), tuple(flat)):
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise BadScore(f"the score of {weight.name} has shape {got}; it is {weight.shape} (one per entry) or {tuple(flat)} (one per unit)")
    if tuple(found.shape) != weight.shape:
        return found.detach().reshape(lengths)
    seen = found.detach().reshape(shape)
    return seen.sum(inside, keepdim=True) if inside else seen


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the ``count`` units of lowest score; of equal ones the later go first, as everywhere in graphprune."""
    flat = scores.ravel()
    gone = torch.zeros(flat.numel(), dtype=torch.bool)
    if count:
        order = torch.sort(flat, descending=True, stable=True).indices
        gone[order[len(order) - count :]] = True
    return gone.reshape(scores.shape)


def share(size: int, ratio: float, name: str) -> int:
    """How many of ``size`` units go; raises :class:`~graphprune.errors.BadRatio` when none would stay."""
    count = math.ceil(ratio * size - 0.5)
    if count >= size:
        raise BadRatio(f"a ratio of {ratio} would empty {name}, which has {size} units; use a smaller ratio there (ratios=) or keep it (keep=)")
    return max(0, count)


def choose(units: Mapping[Weight, torch.Tensor], spec: Spec, ratio: float, scope: str, own: Mapping[str, float]) -> dict[Weight, torch.Tensor]:
    """For every weight, which units go (True). ``scope="global"`` ranks all together and leaves each weight its best unit."""
    for weight, scores in units.items():
        if not bool(torch.isfinite(scores).all()):
            raise BadScore(f"the scores of {weight.name} are not finite (nan or inf); look at its weights and gradients")
    scores = {weight: _dead_first(weight, spec, found) for weight, found in units.items()}
    if spec.threshold is not None:
        gone = {weight: found < spec.threshold for weight, found in scores.items()}
        empty = [weight.name for weight, mine in gone.items() if bool(mine.all())]
        if empty:
            raise BadRatio(f"a threshold of {spec.threshold} would empty {empty[0]}; use a smaller one, or keep it (keep=)")
        return gone
    pools = defaultdict(list)
    for weight in scores:
        alone = scope == "layer" or weight.name in own
        kind = (len(weight.shape), weight.shape[2:], weight.kernel, weight.groups == 1)
        pools[weight if alone else kind if scope == "isomorphic" else None].append(weight)
    gone = {}
    for pool in pools.values():
        if len(pool) == 1:
            weight = pool[0]
            gone[weight] = lowest(scores[weight], share(scores[weight].numel(), own.get(weight.name, ratio), weight.name))
            continue
        flats = [scores[weight].ravel().double().clone() for weight in pool]
        for flat in flats:
            flat[flat.argmax()] = math.inf  # no layer is emptied
        every = torch.cat(flats)
        count = min(share(len(every), ratio, "the model"), len(every) - len(pool))
        for weight, mine in zip(pool, lowest(every, count).split([len(f) for f in flats]), strict=True):
            gone[weight] = mine.reshape(scores[weight].shape)
    return gone


def _dead_first(weight: Weight, spec: Spec, scores: torch.Tensor) -> torch.Tensor:
    """What is masked already goes first, whatever its score: pruning twice to the same ratio changes nothing."""
    view = views(weight, spec)
    scores = scores.cpu()
    if weight.mask is None or view is None:
        return scores
    shape, inside = view
    alive = weight.mask.cpu().reshape(shape)
    alive = alive.any(inside[0], keepdim=True) if len(inside) == 1 else alive.flatten(inside[0]).any(-1).reshape(scores.shape) if inside else alive
    return scores.masked_fill(~alive, -math.inf)


def stays(weight: Weight, spec: Spec, gone: torch.Tensor) -> torch.Tensor:
    """The mask of a weight (True: the entry stays) from the units that go; entries masked before stay masked."""
    shape, _ = views(weight, spec)
    keep = (~gone).expand(shape).reshape(weight.shape)
    return keep if weight.mask is None else keep & weight.mask.cpu()


def n_of_m(weight: Weight, spec: Spec, scores: torch.Tensor) -> torch.Tensor | None:
    """The mask that keeps the ``n`` best of every ``m`` neighbours along the summed axis; None where m does not divide it."""
    size = weight.shape[weight.inputs]
    if size % spec.of:
        return None
    lead = scores.cpu().movedim(weight.inputs, -1)
    if weight.mask is not None:
        lead = lead.masked_fill(~weight.mask.cpu().movedim(weight.inputs, -1), -math.inf)
    order = torch.sort(lead.unflatten(-1, (-1, spec.of)), dim=-1, descending=True, stable=True).indices
    keep = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., : spec.keep], True)
    keep = keep.flatten(-2).movedim(-1, weight.inputs).contiguous()
    return keep if weight.mask is None else keep & weight.mask.cpu()


def check_criterion(criterion: str | EntryScorer, known: tuple[str, ...]) -> None:
    if not callable(criterion) and criterion not in known:
        raise UnknownName(f"no score named {criterion!r} for this granularity; there are {', '.join(known)}, or give a function of the weight")
