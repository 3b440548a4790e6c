"""Fewer layers: by which score blocks or branches go.

``influence`` is ShortGPT's block influence ``1 - E cos(x, y)`` between the stream before and after (Men et al. 2024);
``taylor`` the first-order change of the loss ``|E <dL/dy, y - x>|``; ``reconstruction`` the relative squared error of the
model's output without the block, greedily, one at a time (as SLEB does; Song et al. 2024); ``l1``, ``l2`` the norm of its
weights, ``random`` the baseline. A score may also be a function ``(name, module) -> float``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..catalogue import enter
from ..cutting.parts import Part
from ..cutting.passthrough import passed
from ..errors import BadScore, NeedsBatches
from ..scores.data import Data, undisturbed
from ..scores.registry import accepts, without_data
from ..tracing.graph import Graph
from ..tracing.probe import batch_inputs, watch
from ..tracing.trees import tensors
from .blocks import Removable

enter("score", "influence", "how far a whole block turns the stream it adds to; granularity block or layer (Men et al. 2024 (ShortGPT))")
enter("score", "reconstruction", "change of the output without a whole block, greedy; granularity block or layer (Song et al. 2024 (SLEB))")
DEPTH = ("influence", "taylor", "reconstruction", "l1", "l2", "random")


def tensors_of(model: nn.Module, name: str) -> list[tuple[str, torch.Tensor]]:
    return [(f"{name}.{name_inside}", tensor) for name_inside, tensor in model.get_submodule(name).named_parameters()]


def size_of(model: nn.Module, one: Removable) -> int:
    return sum(tensor.numel() for part in one.skips for _, tensor in tensors_of(model, part.name))


def scores_of(graph: Graph, model: nn.Module, pool: list[Removable], criterion: Any, batches: Any = None, loss: Any = None) -> list[float]:
    """A number for each removable module; larger means more important. Raises BadScore when one is not finite."""
    if callable(criterion):
        accepts(criterion, "(name, module) for whole modules", pool[0].name, model)
        scores = [_number(one.name, criterion(one.name, model.get_submodule(one.name))) for one in pool]
    elif criterion == "random":
        scores = torch.rand(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
    elif criterion in ("l1", "l2"):
        power = 1 if criterion == "l1" else 2
        scores = [
            sum(float(t.detach().double().abs().pow(power).sum()) for p in one.skips for _, t in tensors_of(model, p.name)) ** (1 / power) for one in pool
        ]
    else:
        data = Data(model, batches_of(batches, criterion), loss, name=criterion)
        with undisturbed(model):
            scores = _streams(graph, model, pool, data, criterion == "taylor")
    wrong = [one.name for one, score in zip(pool, scores, strict=True) if not math.isfinite(score)]
    if wrong:
        raise BadScore(f"the score of {wrong[0]} is not finite; look at its weights and at the data")
    return scores


def _number(name: str, score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadScore(f"the score of {name} is a {type(score).__name__}; a score of a whole module is one number") from error


def batches_of(batches: Any, criterion: str) -> Any:
    if batches is None:
        raise NeedsBatches(f"{without_data(criterion, 'inputs')}; 'l2' needs none")
    return batches


def _streams(graph: Graph, model: nn.Module, pool: list[Removable], data: Data, loss: bool) -> list[float]:
    """Influence, or first-order change of the loss, from the stream before and after each module."""
    ends = {id(value): value for one in pool for value in (one.before, one.after)}
    seen: dict[int, torch.Tensor] = {}
    totals, count = [0.0] * len(pool), 0

    def see(value: Any, tensor: torch.Tensor) -> torch.Tensor | None:
        if loss and tensor.requires_grad:
            key = id(value)
            tensor.register_hook(lambda grad: slopes.__setitem__(key, grad))
        seen[id(value)] = tensor.detach().clone()  # what follows may write into it
        return None

    for batch in data:
        slopes: dict[int, torch.Tensor] = {}
        with watch(model, graph, ends.values(), see), torch.set_grad_enabled(loss):
            if loss:
                for parameter in model.parameters():
                    parameter.requires_grad_(True)
                sum_of_losses = data.loss_of(batch)
                torch.autograd.grad(sum_of_losses, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
            else:
                data.run(batch)
        for index, one in enumerate(pool):
            before, after = seen[id(one.before)].double(), seen[id(one.after)].double()
            if loss:
                slope = slopes.get(id(one.after))
                totals[index] += 0.0 if slope is None else float((slope.double() * (after - before)).sum())
            else:
                totals[index] += float(influence(before, after))
        count += 1
    return [abs(total) / count if loss else total / count for total in totals]


def influence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """``1 - mean cos`` over tokens of (batch, tokens, width), or over the samples of anything else.

    >>> float(influence(torch.ones(2, 3, 4), 2 * torch.ones(2, 3, 4)).round(decimals=6))
    0.0
    """
    flat = 2 if before.ndim == 3 else 1
    return 1 - nn.functional.cosine_similarity(before.flatten(flat), after.flatten(flat), dim=-1).mean()


@contextmanager
def without(model: nn.Module, parts: Iterable[Part]) -> Any:
    """While active, the model runs as if the modules of ``skip`` parts were gone (they still run; hooks replace what they return)."""
    handles = []
    for part in parts:
        hook = lambda _, args, kwargs, out, part=part: passed(part, args, kwargs, out)  # noqa: E731
        handles.append(model.get_submodule(part.name).register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def greedy(model: nn.Module, pool: list[Removable], batches: Iterable[Any]) -> Iterator[Removable]:
    """One module at a time, the one whose absence changes the output least; each takes one pass over the batches, in any order."""
    data = Data(model, batches, name="reconstruction")
    data.twice()
    gone: list[Removable] = []
    while len(gone) < len(pool):
        errors = {index: 0.0 for index, one in enumerate(pool) if one not in gone}
        with undisturbed(model), torch.no_grad():
            for batch in data:
                wanted = _outputs(model, batch)
                for index in errors:
                    with without(model, [part for each in (*gone, pool[index]) for part in each.skips]):
                        error = _error(_outputs(model, batch), wanted)
                    errors[index] += error if math.isfinite(error) else math.inf
        gone.append(pool[min(errors, key=lambda index: (errors[index], index))])
        yield gone[-1]


def _outputs(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    args, kwargs = batch_inputs(batch)
    return [t.detach().clone() for t in tensors(model(*args, **kwargs), torch.Tensor) if t.is_floating_point()]


def _error(streams: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return sum(float((a.double() - b.double()).square().sum() / b.double().square().sum().clamp(min=1e-30)) for a, b in zip(streams, wanted, strict=True))
