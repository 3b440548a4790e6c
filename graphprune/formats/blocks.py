"""Blocks that go of a model with a configuration: :func:`in_their_places` chooses them so that those which stay are what its class builds at their places.

A class builds the blocks of a list by their number: the first may have no norm, every second a shifted window. Behind a block that is gone all others move
up by one place; a configuration says what is left where each of them is then as the block that was at this place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..cutting.plan import Plan
from ..errors import BadRatio, BadTarget, NothingToPrune, UnknownName
from ..granularity.blocks import Modules
from ..granularity.depth import tensors_of
from ..planning.depth import candidates
from ..planning.planner import Planner
from ..planning.request import Request
from ..tracing.graph import Graph
from .closing import before_closing
from .misfit import Misfit, misfit

ROUNDS = 8  # plans that are tried
MOVED = "note: other blocks go than those that matter least, so that those which stay are what the configuration builds at their places"


def in_their_places(graph: Graph, model: nn.Module, request: Request, decide: Planner, free: Plan) -> Plan:
    """A plan of fewer blocks that the configuration says, or ``free`` itself where that is one, or none was found."""
    wrong, kept = misfit(graph, model, free), list(request.keep)
    lists = {part.name.rpartition(".")[0] for part in free.parts}
    if not wrong.reason or not lists <= wrong.lists.keys() or any(isinstance(each.amount, tuple) for each in request.wanted):
        return free
    options = {one.name for one in candidates(Modules(graph, model), model, request).free}
    plan, floats = free, False
    for _ in range(ROUNDS):
        names = _moved_up(model, {part.name for part in plan.parts} & options, options, floats)
        try:
            if names:
                wanted = tuple(replace(each, amount=names) for each in request.wanted)
                plan = decide(graph, model, replace(request, wanted=wanted, ratio=0.0))
                wrong = misfit(graph, model, plan)
                if not wrong.reason:
                    return replace(plan, notes=(*plan.notes, MOVED))
            more = _needed(wrong, {part.name for part in plan.parts} & options) if names else set()
            if not more and floats:
                break
            floats = floats or not more
            kept += [name for block in sorted(more) for name, _ in tensors_of(model, block)]
            plan = decide(graph, model, replace(request, keep=tuple(kept)))
        except (BadRatio, BadTarget, NothingToPrune, UnknownName):
            break
    return free


def _needed(wrong: Misfit, gone: set[str]) -> set[str]:
    """The first block that is gone of every list of which the class builds something that the cut model has not, or has not where it is."""
    needed = set()
    for name in wrong.solution.gap.names:
        lists = [path for path in wrong.lists if name.startswith(f"{path}.") or before_closing(name, wrong.lists).startswith(f"{path}.")]
        first = [min((block for block in gone if block.rpartition(".")[0] == path), key=_number, default="") for path in lists]
        needed |= {block for block in first if block}
    return needed


def _number(block: str) -> int:
    last = block.rpartition(".")[2]
    return int(last) if last.isdigit() else -1


def _moved_up(model: nn.Module, gone: set[str], options: set[str], floats: bool) -> tuple[str, ...]:
    """As many blocks of each list as go now, those among ``options`` after which each that stays is like the one that was at its place."""
    lists: dict[str, list[str]] = defaultdict(list)
    for block in gone:
        lists[block.rpartition(".")[0]].append(block)
    names: list[str] = []
    for path, away in sorted(lists.items()):
        blocks = [f"{path}.{key}" if path else key for key, _ in model.get_submodule(path).named_children()]
        kinds = _kinds([model.get_submodule(block) for block in blocks], floats)
        costs = [0 if block in away else 1 if block in options else len(blocks) + 1 for block in blocks]
        names += [blocks[i] for i in _fewest(kinds, costs, len(away))]
    return tuple(names)


def _fewest(kinds: Sequence[Any], costs: Sequence[int], count: int) -> list[int]:
    """Which ``count`` places go so that the others, moved up, are of the kinds that were at their places: at the least cost (all beyond the end do at worst).

    >>> _fewest("abababab", [1, 1, 0, 1, 0, 1, 1, 1], 2)
    [1, 2]
    >>> _fewest("abbb", [0, 1, 1, 1], 1)
    [1]
    """
    ways: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # by how many stay so far: what it costs, and who goes
    for at, (kind, cost) in enumerate(zip(kinds, costs, strict=True)):
        longer: dict[int, tuple[int, list[int]]] = {}
        for stay, (total, gone) in ways.items():
            steps = [(stay, (total + cost, [*gone, at]))] if len(gone) < count else []
            steps += [(stay + 1, (total, gone))] if kind == kinds[stay] else []
            longer |= {end: min(way, longer.get(end, way)) for end, way in steps}
        ways = longer
    return ways[len(kinds) - count][1]


def _kinds(blocks: Sequence[nn.Module], floats: bool) -> list[int]:
    """Equal numbers for blocks that are built alike, with equal modules, shapes of tensors, and plain attributes but for those that count the blocks."""
    plain = (bool, int, str, tuple, float) if floats else (bool, int, str, tuple)
    kinds: list[dict[Any, Any]] = []
    for block in blocks:
        facts: dict[Any, Any] = {name: tuple(tensor.shape) for name, tensor in [*block.named_parameters(), *block.named_buffers()]}
        for path, module in block.named_modules():
            facts[path, ""] = type(module)
            facts |= {(path, key): value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}
        kinds.append(facts)
    numbers = {key for key in kinds[0] if all(type(kind.get(key)) is int and kind[key] == at for at, kind in enumerate(kinds))}
    alike = [{key: value for key, value in kind.items() if key not in numbers} for kind in kinds]
    return [alike.index(kind) for kind in alike]
