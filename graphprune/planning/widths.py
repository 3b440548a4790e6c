"""From groups to widths that the model's own code allows: choose, solve for the attributes, tie or lock, and choose again.

Where a size in the code cannot follow its axis, groups that the code derives from each other keep the same share; where that
does not help, the axis is left whole with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..budget.choose import fit
from ..cost import priced
from ..coupling.groups import Groups, couple
from ..cutting.plan import Plan, Survivors, make_plan
from ..errors import BadTarget, NothingToPrune
from ..granularity.heads import others
from ..names import overrides
from ..scores import Scores
from ..select import Kept, select
from ..tracing.sizes import leaves
from ..tracing.symbols import solve
from ..tracing.trace import Graph
from .request import Request

TRIES = 16  # how many widths are tried before an axis is left whole
Scored = Callable[[Groups], Iterator[Scores]]


def plan_widths(graph: Graph, model: nn.Module, request: Request, scored: Scored, literals: set[str] | None = None) -> tuple[Groups, Kept, Plan]:
    """Couple, score and select; whatever no attribute can express is left whole, with the reason.

    ``literals`` collects the modules whose code holds such a size as a literal.
    """
    locks: list = []
    notes: list[str] = []
    ties: list[frozenset[int]] = []
    whole = tuple((name, None) for name in request.keep if name in graph.leaves)
    groups = couple(graph, whole)
    if request.spec.name == "head":
        locks += others(groups)
        groups = couple(graph, whole, tuple(locks))
    for _ in range(40):
        if not len(groups):
            raise NothingToPrune(_nothing(groups) + "".join(f"\n  {note}" for note in dict.fromkeys(notes)))
        own = overrides(groups, model, request.widths.ratios)
        for scores in scored(groups):
            while True:
                kept = _choose(groups, scores, request, own, ties)
                edits, wrong = solve(graph, Survivors(groups, kept).length)
                tied = _tie(graph, groups, wrong, ties)
                if tied == ties:
                    break
                ties = tied
            if literals is not None:
                literals.update(call.module for _, _, call in wrong if call and isinstance(call.expr, int))
            if wrong and request.plain:
                kept, edits, wrong = _widened(graph, groups, request, scores, own, ties, (kept, edits, wrong))
            if wrong:
                break
        else:
            return groups, kept, make_plan(groups, kept, edits, tuple(notes))
        for need, expr, call in wrong:
            where = ", ".join(part for part in (call.module, call.line) if part) if call else ""
            text = f"no attribute behind the size given to {call.op} ({where})" if call else "a factor or a branch depends on this size"
            for value, dim in _places(graph, need, expr):
                locks += [(field, text) for field in value.fields if field.shape[dim] > 1]
            notes.append(f"note: {text}")
        groups, ties = couple(graph, whole, tuple(locks)), []
    raise NothingToPrune("sizes in the code contradict each other; the last ones: " + "; ".join(notes[-3:]))


def _choose(groups: Groups, scores: Scores, request: Request, ratios: Mapping[int, float], ties: Sequence[frozenset[int]]) -> Kept:
    """The units that stay, by a ratio or under the limits that the request set."""
    step = request.multiple_of if isinstance(request.multiple_of, int) else request.multiple_of(groups)
    rules = {"scope": request.scope, "multiple_of": step, "min_units": request.widths.at_least, "ratios": ratios, "ties": ties}
    if not request.extra_costs and not request.aims.any:
        if request.scope == "allocated":
            raise BadTarget("scope='allocated' chooses widths under a budget; give one of params, macs, size, memory, latency, speedup")
        if isinstance(step, int):
            return select(groups, scores, request.ratio, **rules)
    known = priced(groups, {name: make for name, (_, make) in request.extra_costs.items()})
    asked = request.aims.limits(known.full) | {name: limit for name, (limit, _) in request.extra_costs.items()}
    return fit(groups, scores, asked, known, request.ratio, **rules, time=request.aims.weight)


def _widened(graph: Graph, groups: Groups, request: Request, scores: Scores, own: dict, ties: list, found: tuple) -> tuple:
    """Where sizes cannot follow a width, the next larger one with which they can (so that a larger ratio never leaves more)."""
    kept, edits, wrong = found
    own = dict(own)
    for _ in range(2 * len(wrong)):
        if not wrong:
            break
        need, expr, _ = wrong[0]
        mine = sorted({index for value, dim in _places(graph, need, expr) for index in groups.along(value, dim)})
        if not mine:
            return found
        size, width = max((groups.groups[index].size, len(kept[index])) for index in mine)
        for wider in range(width + 1, size, max(1, (size - width) // TRIES)):
            trial = own | {index: 1 - wider / size for index in mine}
            wide = _choose(groups, scores, request, trial, ties)
            changed, left = solve(graph, Survivors(groups, wide).length)
            if len(left) < len(wrong):
                own, kept, edits, wrong = trial, wide, changed, left
                break
        else:
            return found
    return kept, edits, wrong


def _tie(graph: Graph, groups: Groups, wrong: list, ties: list[frozenset[int]]) -> list[frozenset[int]]:
    """Groups whose widths the code derives from each other have to keep the same share."""
    for need, expr, _ in wrong:
        if need is None:
            continue
        dims = [(leaf[1], leaf[2]) for leaf in leaves(expr) if leaf[0] == "dim"]
        # One attribute (of a configuration that layers share) stands for several axes.
        places = [(need.value, need.dim), *(dims or _behind(graph, expr))]
        mine = frozenset(index for value, dim in places for index in groups.along(value, dim))
        if len(mine) < 2 or any(mine <= tie for tie in ties):
            continue
        touching = [tie for tie in ties if tie & mine]
        ties = [tie for tie in ties if not tie & mine] + [mine.union(*touching)]
    return ties


def _places(graph: Graph, need: Any, expr: Any) -> list:
    """The axes that a size which cannot be expressed stands for."""
    dims = [(leaf[1], leaf[2]) for leaf in leaves(expr) if leaf[0] == "dim"]
    return [(need.value, need.dim), *dims] if need else dims + _behind(graph, expr)


def _behind(graph: Graph, expr: Any) -> list:
    """The axes whose sizes a factor's attributes stand for."""
    paths = {leaf[1] for leaf in leaves(expr) if leaf[0] == "attr"}
    calls = [c for c in graph.calls if any(leaf[0] == "attr" and leaf[1] in paths for leaf in leaves(c.expr))]
    return [(call.need.value, call.need.dim) for call in calls]


def _nothing(groups: Groups) -> str:
    sizes = {place: groups.graph.leaves[place[0]].shape for place in groups.locked}
    large = sorted(groups.locked.items(), key=lambda item: -torch.Size(sizes[item[0]]).numel())[:5]
    rows = [f"  {name} axis {axis}: {reason}" for (name, axis), reason in large]
    return "no axis of this model can be removed. The largest that stay whole:\n" + "\n".join(rows)
