"""Units of entries of a weight, and their scores.

A unit is a single weight, a row or column of a kernel (*vector*; Mao et al. 2017), a kernel (one filter x one input
channel), or the same (channel, tap) in every filter (*group*; Lebedev & Lempitsky 2016). ``n:m`` keeps n of every m
neighbours along the summed axis (Mishra et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import BadScore, UnknownName
from ..scores.registry import accepts
from .spec import Spec
from .weights import Weight

EntryScorer = Callable[[torch.Tensor], torch.Tensor]
NORMS = ("l1", "l2", "linf")
# Scores of single weights that only an entry-wise criterion knows.
ENTRYWISE = (*NORMS, "random", "taylor", "synaptic", "lamp")


def views(weight: Weight, spec: Spec) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """How a weight is seen as units: the shape to view it in, and the axes inside a unit; None where there are none."""
    shape, rank = weight.shape, len(weight.shape)
    if spec.name in ("weight", "n:m"):
        return shape, ()
    if not weight.kernel:
        return None
    if spec.name == "kernel":
        return shape, tuple(range(2, rank))
    if spec.name == "vector":
        return (shape, (rank - 2 if spec.option == "column" else rank - 1,)) if weight.kernel > 1 or spec.option != "column" else None
    if weight.inputs != 1:
        return None  # the filters of a transposed convolution do not share columns
    if spec.option == "box":
        return shape, (0, 1)
    return (weight.groups, shape[0] // weight.groups, *shape[1:]), (1,)


def unit_scores(
    weight: Weight, view: tuple[Any, ...], data: torch.Tensor, criterion: str | EntryScorer, grad: torch.Tensor | None, gamma: torch.Tensor | None
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
        return _finite(weight, _custom(weight, shape, inside, criterion(data.clone())))
    if criterion == "random":
        generator = torch.Generator().manual_seed(weight.call)
        return torch.rand([1 if a in inside else n for a, n in enumerate(shape)], generator=generator, dtype=torch.float64)
    if criterion == "taylor":
        assert grad is not None
        product = (wide * grad.to(wide.dtype)).reshape(shape)
        return _finite(weight, (product.sum(inside, keepdim=True) if inside else product).abs())
    if criterion == "synaptic" and gamma is not None:
        wide = wide * gamma.to(wide.dtype).abs().reshape([-1 if a == weight.inputs else 1 for a in range(wide.ndim)])
    seen = wide.reshape(shape)
    order = {"l1": 1, "linf": math.inf}.get(criterion, 2)
    norms = torch.linalg.vector_norm(seen, order, inside, keepdim=True) if inside else seen.abs()
    return _finite(weight, _lamp(norms) if criterion == "lamp" else norms)


def _finite(weight: Weight, scores: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise BadScore(f"the scores of {weight.name} are not finite (nan or inf); look at its weights and gradients")
    return scores


def _lamp(norms: torch.Tensor) -> torch.Tensor:
    squares, order = norms.double().square().ravel().sort(stable=True)
    rest = squares.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = squares / rest.clamp(min=torch.finfo(torch.float64).tiny)
    return scores.reshape(norms.shape)


def _custom(weight: Weight, shape: tuple[Any, ...], inside: tuple[Any, ...], scores: torch.Tensor) -> torch.Tensor:
    lengths = [1 if a in inside else n for a, n in enumerate(shape)]
    flat = [n for a, n in enumerate(shape) if a not in inside]
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) not in (weight.shape, tuple(lengths), tuple(flat)):
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise BadScore(f"the score of {weight.name} has shape {got}; it is {weight.shape} (one per entry) or {tuple(flat)} (one per unit)")
    if tuple(scores.shape) != weight.shape:
        return scores.detach().reshape(lengths)
    seen = scores.detach().reshape(shape)
    return seen.sum(inside, keepdim=True) if inside else seen


def stays(weight: Weight, spec: Spec, gone: torch.Tensor) -> torch.Tensor:
    """The mask of a weight (True: the entry stays) from the units that go."""
    view = views(weight, spec)
    assert view is not None  # its units were scored
    shape, _ = view
    return (~gone).expand(shape).reshape(weight.shape)


def n_of_m(weight: Weight, spec: Spec, scores: torch.Tensor) -> torch.Tensor:
    """The mask that keeps the ``n`` best of every ``m`` neighbours along the summed axis, which m divides."""
    lead = scores.cpu().movedim(weight.inputs, -1)
    if weight.mask is not None:
        lead = lead.masked_fill(~weight.mask.cpu().movedim(weight.inputs, -1), -math.inf)
    order = torch.sort(lead.unflatten(-1, (-1, spec.of)), dim=-1, descending=True, stable=True).indices
    keep = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., : spec.keep], True)
    return keep.flatten(-2).movedim(-1, weight.inputs).contiguous()


def check_criterion(criterion: str | EntryScorer, known: tuple[str, ...]) -> None:
    if not callable(criterion) and criterion not in known:
        raise UnknownName(f"no score named {criterion!r} for this granularity; there are {', '.join(known)}, or give a function of the weight")
    if callable(criterion):
        accepts(criterion, "(weight) for everything finer than channels", torch.empty(0))
