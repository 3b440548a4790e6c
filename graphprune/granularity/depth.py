"""Fewer layers: which blocks or branches go, and by which score.

``influence`` is ShortGPT's block influence ``1 - E cos(x, y)`` between the stream before and after (Men et al. 2024);
``taylor`` the first-order change of the loss ``|E <dL/dy, y - x>|``; ``reconstruction`` the relative squared error of the
model's output without the block, greedily, one at a time (as SLEB does; Song et al. 2024); ``l1``, ``l2`` the norm of its
weights, ``random`` the baseline. A score may also be a function ``(name, module) -> float``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..catalogue import register
from ..cost import macs_by_call
from ..cutting.parts import Part
from ..cutting.passthrough import passed
from ..cutting.plan import Plan
from ..errors import BadScore, NeedsBatches, NothingToPrune, UnknownName, warn
from ..scores.data import Data, undisturbed
from ..scores.registry import accepts
from ..select import width
from ..tracing.probe import batch_inputs, watch
from ..tracing.trace import Graph
from ..tracing.trees import leaf_tensors, tensors
from .blocks import Modules, Removable
from .wishes import Wishes, holds, reached, unmet

register("score", "influence", "how far a whole block turns the stream it adds to; granularity block or layer (Men et al. 2024 (ShortGPT))")
register("score", "reconstruction", "change of the output without a whole block, greedy; granularity block or layer (Song et al. 2024 (SLEB))")
DEPTH = ("influence", "taylor", "reconstruction", "l1", "l2", "random")


def plan_depth(graph: Graph, model: nn.Module, wishes: Wishes) -> Plan:
    """The plan that removes a share of a model's blocks ("block") or of its branches and hidden layers ("layer"), and more until its limits hold.

    A module with a kept tensor stays, one with a ratio of its own is chosen apart.
    """
    kind, criterion = wishes.spec.name, wishes.criterion
    if not callable(criterion) and criterion not in DEPTH:
        raise UnknownName(f"no score named {criterion!r} for whole {kind}s; there are {', '.join(DEPTH)}, or give a function (name, module) -> float")
    limits = wishes.limits(graph, ("params", "macs", "size"))
    modules = Modules(graph, model)
    found = modules.blocks() if kind == "block" else modules.layers()
    held = set(wishes.keep)
    owned = {one.name: [n for part in one.skips for n, _ in _tensors(model, part.name)] for one in found}
    free = [one for one in found if not held & set(owned[one.name])]
    if not free:
        raise NothingToPrune(
            f"no {kind} of this model can be removed: none returns the shape it takes and is residual, in a chain, or only added; {len(found)} are kept"
        )
    pools: dict[float | None, list[Removable]] = {}
    for one in free:
        own = {wishes.ratios.get(name) for name in owned[one.name]}
        pools.setdefault(own.pop() if len(own) == 1 else None, []).append(one)
    gone: list[Removable] = []
    extra: list[Removable] = []  # for the limits alone
    left = Left(graph, model, modules)
    for own, pool in sorted(pools.items(), key=lambda item: item[0] is None):  # what limits ask for comes last
        count = len(pool) - width(len(pool), wishes.ratio if own is None else own)
        for at, one in enumerate(_order(graph, model, pool, wishes)):
            if at >= count and (own is not None or holds(left.costs(gone), limits)):
                break
            gone.append(one)
            extra += [one] if at >= count else []
    for one in reversed(extra[:-1]):  # what still fits once a larger one is gone comes back, the most important first
        others = [other for other in gone if other is not one]
        gone = others if holds(left.costs(others), limits) else gone
    if limits and not holds(left.costs(gone), limits):
        raise unmet(left.costs(gone), limits, kind)
    if not gone and not limits:
        _tell(kind, pools, wishes.ratio)
    order = [one for one in free if one in gone]
    parts = {part.name: part for one in order for part in one.skips}
    lines = reached(left.costs(gone), limits) if limits else []
    lines += [f"{one.name}: {'removed' if one in gone else 'stays'} ({_size(model, one)} weights)" for one in free]
    lines += [f"{one.name}: stays, kept on request" for one in found if one not in free]
    return Plan({}, {}, (), (), tuple(lines), parts=tuple(parts.values()))


def _tell(kind: str, pools: Mapping[float | None, Sequence[Removable]], ratio: float) -> None:
    """Say it when a ratio above 0 removes nothing."""
    asked = [(ratio if own is None else own, pool) for own, pool in pools.items() if (ratio if own is None else own) > 0]
    if not asked:
        return
    most, pool = max(asked, key=lambda item: item[0] * len(item[1]))
    names = ", ".join(one.name for one in pool[:3]) + (", …" if len(pool) > 3 else "")
    one, several = f"the only {kind} that can go is {names}", f"{len(pool)} {kind}s can go ({names})"
    what = "and the last one always stays" if len(pool) == 1 else f"a ratio above {0.5 / len(pool):.3g} removes one"
    warn(f"ratio {most:g} removes nothing: {one if len(pool) == 1 else several}, {what}")


class Left:
    """What a model costs without some of its modules: the parameters it still holds, and the calls that still reach an output."""

    def __init__(self, graph: Graph, model: nn.Module, modules: Modules) -> None:
        self.model, self.modules, self.macs = model, modules, macs_by_call(graph)

    def costs(self, gone: Sequence[Removable]) -> dict[str, float]:
        skipped = {part.name: bool(part.data[2]) for one in gone for part in one.skips}
        inside = tuple(f"{name}." for name in skipped)
        held = {id(t): t for name, _, _, t in leaf_tensors(self.model) if not name.startswith(inside)}.values()
        params = sum(t.numel() for t in held if isinstance(t, nn.Parameter))
        live = self.modules.live({one.name: bool(one.skips[0].data[2]) for one in gone})
        return {"params": params, "macs": sum(self.macs[index] for index in live), "size": sum(t.numel() * t.element_size() for t in held)}


def _tensors(model: nn.Module, name: str) -> list[tuple[str, torch.Tensor]]:
    return [(f"{name}.{own}", tensor) for own, tensor in model.get_submodule(name).named_parameters()]


def _size(model: nn.Module, one: Removable) -> int:
    return sum(tensor.numel() for part in one.skips for _, tensor in _tensors(model, part.name))


def _order(graph: Graph, model: nn.Module, pool: list[Removable], wishes: Wishes) -> Iterator[Removable]:
    """All but the last one that may go, the first to go first."""
    if wishes.criterion == "reconstruction":
        return islice(_greedy(model, pool, _batches(wishes.batches, wishes.criterion)), len(pool) - 1)
    scores = scores_of(graph, model, pool, wishes.criterion, wishes.batches, wishes.loss)
    order = sorted(range(len(pool)), key=lambda i: (scores[i], -i))
    return (pool[i] for i in order[:-1])


def scores_of(graph: Graph, model: nn.Module, pool: list[Removable], criterion: Any, batches: Any = None, loss: Any = None) -> list[float]:
    """A number for each removable module; larger means more important. Raises BadScore when one is not finite."""
    if callable(criterion):
        accepts(criterion, "(name, module) for whole modules", pool[0].name, model)
        found = [_number(one.name, criterion(one.name, model.get_submodule(one.name))) for one in pool]
    elif criterion == "random":
        found = torch.rand(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
    elif criterion in ("l1", "l2"):
        power = 1 if criterion == "l1" else 2
        found = [sum(float(t.detach().double().abs().pow(power).sum()) for p in one.skips for _, t in _tensors(model, p.name)) ** (1 / power) for one in pool]
    else:
        data = Data(model, _batches(batches, criterion), loss, name=criterion)
        with undisturbed(model):
            found = _streams(graph, model, pool, data, criterion == "taylor")
    wrong = [one.name for one, score in zip(pool, found, strict=True) if not math.isfinite(score)]
    if wrong:
        raise BadScore(f"the score of {wrong[0]} is not finite; look at its weights and at the data")
    return found


def _number(name: str, score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadScore(f"the score of {name} is a {type(score).__name__}; a score of a whole module is one number") from error


def _batches(batches: Any, criterion: str) -> Any:
    if batches is None:
        raise NeedsBatches(f"the score {criterion!r} needs data; give batches= (any iterable of batches), or take 'l2'")
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
                found = data.loss_of(batch)
                torch.autograd.grad(found, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
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


def _greedy(model: nn.Module, pool: list[Removable], batches: Iterable) -> Iterator[Removable]:
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


def _error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return sum(float((a.double() - b.double()).square().sum() / b.double().square().sum().clamp(min=1e-30)) for a, b in zip(found, wanted, strict=True))
