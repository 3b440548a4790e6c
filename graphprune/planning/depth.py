"""The plan of fewer layers: which blocks or branches go, under a ratio and limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from torch import nn

from ..cutting.outline import Outline, Totals
from ..cutting.plan import Plan
from ..errors import NothingToPrune, UnknownName, warn
from ..granularity.blocks import Modules, Removable
from ..granularity.depth import DEPTH, batches_of, greedy, scores_of, size_of, tensors_of
from ..granularity.remaining import Remaining
from ..names import by_tensor
from ..select import width
from ..tracing.trace import Graph
from .limits import holds, reached, unmet
from .request import Request


def plan_depth(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan that removes a share of a model's blocks ("block") or of its branches and hidden layers ("layer"), and more until its limits hold.

    A module with a kept tensor stays, one with a ratio of its own is chosen apart.
    """
    kind, score = request.spec.name, request.score
    if not callable(score) and score not in DEPTH:
        raise UnknownName(f"no score named {score!r} for whole {kind}s; there are {', '.join(DEPTH)}, or give a function (name, module) -> float")
    limits = request.limits(graph, ("params", "macs", "size"))
    ratios = by_tensor(model, request.widths.ratios)
    modules = Modules(graph, model)
    found = modules.blocks() if kind == "block" else modules.layers()
    held = set(request.keep)
    owned = {one.name: [n for part in one.skips for n, _ in tensors_of(model, part.name)] for one in found}
    free = [one for one in found if not held & set(owned[one.name])]
    names = {one.name for one in free}
    if not free:
        raise NothingToPrune(
            f"no {kind} of this model can be removed: none returns the shape it takes and is residual, in a chain, or only added; {len(found)} are kept"
        )
    pools: dict[float | None, list[Removable]] = {}
    for one in free:
        own = {ratios.get(name) for name in owned[one.name]}
        pools.setdefault(own.pop() if len(own) == 1 else None, []).append(one)
    gone: list[Removable] = []
    extra: list[Removable] = []  # for the limits alone
    remaining = Remaining(graph, model, modules)
    whole = dict(remaining.costs)
    for own, pool in sorted(pools.items(), key=lambda item: item[0] is None):  # what limits ask for comes last
        count = len(pool) - width(len(pool), request.ratio if own is None else own)
        for at, one in enumerate(_order(graph, model, pool, request)):
            if at >= count and (own is not None or holds(remaining.costs, limits)):
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
    removed = {one.name for one in gone} - back
    if limits and not holds(remaining.costs, limits):
        raise unmet(remaining.costs, limits, kind)
    if not removed and not limits:
        _tell(kind, pools, request.ratio)
    order = [one for one in free if one.name in removed]
    parts = {part.name: part for one in order for part in one.skips}
    lines = reached(remaining.costs, limits) if limits else []
    lines += [f"{one.name}: {'removed' if one.name in removed else 'stays'} ({size_of(model, one)} weights)" for one in free]
    lines += [f"{one.name}: stays, kept on request" for one in found if one.name not in names]
    before, after = (Totals(round(costs["params"]), round(costs["macs"])) for costs in (whole, remaining.costs))
    shapes = {name: tuple(leaf.shape) for name, leaf in graph.leaves.items() if name in graph.parameters}
    return Plan({}, {}, (), (), tuple(lines), parts=tuple(parts.values()), outline=Outline(before, after, shapes=shapes))


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


def _order(graph: Graph, model: nn.Module, pool: list[Removable], request: Request) -> Iterator[Removable]:
    """All but the last one that may go, the first to go first."""
    if request.score == "reconstruction":
        return islice(greedy(model, pool, batches_of(request.batches, request.score)), len(pool) - 1)
    scores = scores_of(graph, model, pool, request.score, request.batches, request.loss)
    order = sorted(range(len(pool)), key=lambda i: (scores[i], -i))
    return (pool[i] for i in order[:-1])
