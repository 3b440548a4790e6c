"""The plan of fewer layers: which blocks or branches go, by which there are, under a ratio and limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from ..cutting.outline import Outline, Totals
from ..cutting.plan import Plan
from ..errors import BadRatio, NothingToPrune, UnknownName, warn
from ..granularity.blocks import Modules, Removable
from ..granularity.depth import DEPTH, batches_of, greedy, scores_of, size_of, tensors_of
from ..granularity.remaining import Remaining
from ..names import by_tensor
from ..select import width
from ..tracing.graph import Graph
from .limits import holds, reached, unmet
from .request import Request

Pools = Mapping[float | None, Sequence[Removable]]


@dataclass(frozen=True)
class Candidates:
    """The modules that can go, those that may, and those that are chosen together because they have a ratio of their own (None: that of all)."""

    every: list[Removable]
    free: list[Removable]
    pools: Pools


def plan_depth(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan that removes a share of a model's blocks ("block") or of its branches and hidden layers ("layer"), and more until its limits hold.

    A module with a kept tensor stays, one with a ratio of its own is chosen apart; which ones go may be said outright.
    """
    kind = request.spec.name
    _check_score(kind, request.score)
    limits = request.limits(graph, ("params", "macs", "size"))
    modules = Modules(graph, model)
    options = candidates(modules, model, request)
    remaining = Remaining(graph, model, modules)
    whole = dict(remaining.costs)
    amount = request.wanted[0].amount
    if isinstance(amount, tuple):
        chosen = _named(options, amount, kind)
        for one in chosen:
            remaining.remove(one)
    else:
        chosen = _chosen(options, graph, model, request, remaining, limits)
    if limits and not holds(remaining.costs, limits):
        raise unmet(remaining.costs, limits, kind)
    gone = {one.name for one in chosen}
    if not gone and not limits and request.alone:
        _tell(kind, options.pools, request.ratio)
    parts = {part.name: part for one in options.free if one.name in gone for part in one.skips}
    lines = [*(reached(remaining.costs, limits) if limits else ()), *_lines(options, gone, model)]
    before, after = (Totals(round(costs["params"]), round(costs["macs"])) for costs in (whole, remaining.costs))
    lost = sorted(name for name in gone if modules.shaped[name].lost)
    named = f"{', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}"
    notes = (f"note: {named} returned more, which nobody reads in the runs that were seen; it is None now",) if lost else ()
    shapes = {name: tuple(leaf.shape) for name, leaf in graph.leaves.items() if name in graph.parameters}
    return Plan({}, {}, (), notes, tuple(lines), parts=tuple(parts.values()), outline=Outline(before, after, shapes=shapes))


def _check_score(kind: str, score: Any) -> None:
    if not callable(score) and score not in DEPTH:
        raise UnknownName(f"no score named {score!r} for whole {kind}s; there are {', '.join(DEPTH)}, or give a function (name, module) -> float")


def _lines(options: Candidates, gone: set[str], model: nn.Module) -> Iterator[str]:
    """What becomes of every module that could go."""
    for one in options.free:
        yield f"{one.name}: {'removed' if one.name in gone else 'stays'} ({size_of(model, one)} weights)"
    free = {one.name for one in options.free}
    for one in options.every:
        if one.name not in free:
            yield f"{one.name}: stays, kept on request"


def candidates(modules: Modules, model: nn.Module, request: Request) -> Candidates:
    """The modules that can go; raises :class:`~graphprune.errors.NothingToPrune` when none may."""
    kind, ratios, kept = request.spec.name, by_tensor(model, request.widths.ratios), set(request.keep)
    every = modules.blocks() if kind == "block" else modules.layers()
    owned = {one.name: [name for part in one.skips for name, _ in tensors_of(model, part.name)] for one in every}
    free = [one for one in every if not kept & set(owned[one.name])]
    if not free:
        raise NothingToPrune(
            f"no {kind} of this model can be removed: none returns the shape it takes and is residual, in a chain, or only added; {len(every)} are kept"
        )
    pools: dict[float | None, list[Removable]] = {}
    for one in free:
        shares = {ratios.get(name) for name in owned[one.name]}
        pools.setdefault(shares.pop() if len(shares) == 1 else None, []).append(one)
    return Candidates(every, free, pools)


def _named(options: Candidates, choice: Sequence[int | str], kind: str) -> list[Removable]:
    """The modules that are to go, by name or by number; raises :class:`~graphprune.errors.UnknownName` with what there is."""
    every = options.every
    names = [one.name for one in every]
    for each in choice:
        if (each not in names) if isinstance(each, str) else not -len(every) <= each < len(every):
            raise UnknownName(
                f"there is no {kind} {each!r} that can go; there are {len(every)}, numbered from 0: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
            )
    places = dict.fromkeys((names.index(each) if isinstance(each, str) else each) % len(every) for each in choice)
    gone = [every[place] for place in places]
    kept = [one.name for one in gone if one not in options.free]
    if kept:
        raise BadRatio(f"{kept[0]} is to go and to be kept; leave it out of keep= or of what=")
    if len(gone) == len(every):
        raise BadRatio(f"all {len(every)} {kind}s of the model are to go; one has to stay")
    return gone


def _chosen(options: Candidates, graph: Graph, model: nn.Module, request: Request, remaining: Remaining, limits: Mapping[str, float]) -> list[Removable]:
    """The modules with the lowest scores, as many as the ratio says, and more until the limits hold; ``remaining`` is then what is left without them."""
    gone: list[Removable] = []
    extra: list[Removable] = []  # for the limits alone
    for share, pool in sorted(options.pools.items(), key=lambda item: item[0] is None):  # what limits ask for comes last
        count = _count(pool, share, request, len(options.every) - len(options.free))
        for at, one in enumerate(_order(graph, model, list(pool), request, one_stays=len(options.every) == len(options.free))):
            if at >= count and (share is not None or holds(remaining.costs, limits)):
                break
            gone.append(one)
            remaining.remove(one)
            extra += [one] if at >= count else []
    back: set[str] = set()
    for one in reversed(extra[:-1]):  # what still fits once a larger one is gone comes back, the most important first
        remaining.restore(one)
        if holds(remaining.costs, limits):
            back.add(one.name)
        else:
            remaining.remove(one)
    return [one for one in gone if one.name not in back]


def _count(pool: Sequence[Removable], ratio: float | None, request: Request, kept: int) -> int:
    """How many of a pool go in any case, where ``kept`` others stay on request."""
    amount = request.wanted[0].amount
    if ratio is None and isinstance(amount, int):
        if amount > len(pool) + kept:
            raise BadRatio(f"{amount} {request.text} are to stay; {len(pool) + kept} can go{' or are kept' if kept else ''}")
        if amount < max(kept, 1):
            raise BadRatio(f"{amount} {request.text} are to stay; {kept} are kept on request")
        return len(pool) + kept - amount
    share = ratio if ratio is not None else request.ratio if amount is None else amount
    return len(pool) - width(len(pool), share)


def _tell(kind: str, pools: Pools, ratio: float) -> None:
    """Say it when a ratio above 0 removes nothing."""
    asked = [(ratio if share is None else share, pool) for share, pool in pools.items() if (ratio if share is None else share) > 0]
    if not asked:
        return
    most, pool = max(asked, key=lambda item: item[0] * len(item[1]))
    names = ", ".join(one.name for one in pool[:3]) + (", …" if len(pool) > 3 else "")
    one, several = f"the only {kind} that can go is {names}", f"{len(pool)} {kind}s can go ({names})"
    what = "and the last one always stays" if len(pool) == 1 else f"a ratio above {0.5 / len(pool):.3g} removes one"
    warn(f"ratio {most:g} removes nothing: {one if len(pool) == 1 else several}, {what}")


def _order(graph: Graph, model: nn.Module, pool: list[Removable], request: Request, one_stays: bool) -> Iterator[Removable]:
    """Those that may go, the first to go first; all but the last, if ``one_stays``."""
    most = len(pool) - one_stays
    if request.score == "reconstruction":
        return islice(greedy(model, pool, batches_of(request.batches, request.score)), most)
    scores = scores_of(graph, model, pool, request.score, request.batches, request.loss)
    order = sorted(range(len(pool)), key=lambda i: (scores[i], -i))
    return (pool[i] for i in order[:most])
