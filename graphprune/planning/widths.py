"""From groups to widths that the model's own code allows: choose, solve for the attributes, tie or lock, and choose again.

Where a size in the code cannot follow its axis, groups that the code derives from each other keep the same share; where that
does not help, and the cut code proves to compute something else, the axis is left whole with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..budget.choose import fit
from ..cost import priced
from ..coupling.groups import Groups, couple
from ..cutting.plan import Plan, Survivors, make_plan
from ..errors import BadTarget, NothingToPrune
from ..granularity.heads import whole_insides
from ..names import overrides
from ..operations.labels import Array, varying
from ..scores import Scores
from ..scores.attempts import Attempts
from ..select import Kept, select
from ..tracing.choices import least
from ..tracing.graph import Graph
from ..tracing.sizes import leaves
from ..tracing.symbols import Wrong, solve
from .proof import Fault, Proof, numbers_of_unknown_origin
from .request import Request
from .shares import shares
from .uniform import alike
from .units.experts import beside
from .unread import narrower, unread_sizes
from .wanted import amounts, of_kind, others

ROUNDS = 40  # how often groups are coupled anew because something proved wrong
TRIES = 16  # how many widths are tried before an axis is left whole


def plan_widths(graph: Graph, model: nn.Module, request: Request, scored: Attempts, literals: set[str] | None = None) -> tuple[Groups, Kept, Plan]:
    """Couple, score and select; whatever no attribute can express is left whole, with the reason.

    ``literals`` collects the modules whose code holds such a size as a literal.
    """
    proof = Proof(graph, model, request.proof == "values", bool(request.proof) or numbers_of_unknown_origin(graph, model))
    coupling = _Coupling(graph, request)
    for _ in range(ROUNDS):
        groups = coupling.groups
        if not len(groups):
            raise NothingToPrune(_nothing(groups) + "".join(f"\n  {note}" for note in dict.fromkeys(coupling.notes)))
        ratios = amounts(groups, request) | overrides(groups, model, request.widths.ratios, request.widths.to)
        wrong, faults = [], []
        for draft, scores in scored(groups):
            kept, edits, wrong, faults = coupling.attempt(proof, scores, ratios, draft)
            if literals is not None:
                literals.update(each.call.module for each in wrong if each.call and isinstance(each.expr, int))
            if wrong or faults:
                break
        else:
            more, said = unread_sizes(graph, model, groups, kept)
            said += narrower(graph, groups, kept)
            return groups, kept, make_plan(groups, kept, edits | more, tuple(dict.fromkeys([*coupling.notes, *said])))
        coupling.learn(wrong, faults)
    raise NothingToPrune("sizes in the code contradict each other; the last ones: " + "; ".join(coupling.notes[-3:]))


class _Attempt(NamedTuple):
    """Widths by one set of scores: the units that stay, new values of attributes, and what is wrong with them."""

    kept: Kept
    edits: dict
    wrong: list[Wrong]
    faults: list[Fault]


class _Coupling:
    """The groups of a graph, coupled anew whenever something proves wrong: locks and joins are what was learnt so far, and notes say so."""

    def __init__(self, graph: Graph, request: Request) -> None:
        self.graph, self.request = graph, request
        self.locks: list = [(fault.labels, fault.text) for where, fault in request.faults if where is graph]
        self.notes: list[str] = [f"note: {text}" for _, text in self.locks]
        self.locks += request.spec.locks(graph) if request.spec.locks else []
        self.joins: list[tuple[Array, Array]] = []
        self.tied: set[tuple] = set()  # uses of a size whose axes were joined already
        self.locked: set[tuple] = set()  # … and those whose axes are whole
        keep = [item if isinstance(item, tuple) else (item, None) for item in request.keep]
        self.whole = tuple((name, axis) for name, axis in keep if name in graph.leaves)
        groups = self.coupled()
        if {each.spec.name for each in request.wanted} & {"head", "heads"} and not of_kind(groups, "heads"):
            self.locks += whole_insides(graph)
            groups = self.coupled()
        if any(each.spec.name == "experts" for each in request.wanted) and graph.choices and not of_kind(groups, "experts"):
            known, self.locks = self.locks, [*self.locks, *beside(graph)]
            alone = self.coupled()
            groups, self.locks = (alone, self.locks) if of_kind(alone, "experts") else (groups, known)
        unwanted = others(groups, request)
        if unwanted:
            self.locks += unwanted
            groups = self.coupled()
        self.groups, self.ties = self.uniform(groups)

    def coupled(self) -> Groups:
        return couple(self.graph, self.whole, tuple(self.locks), self.request.free, self.joins)

    def uniform(self, groups: Groups) -> tuple[Groups, list[frozenset[int]]]:
        """The ties between groups of one kind, if widths are to be uniform; what is locked in one layer is then locked in all."""
        if not self.request.widths.uniform:
            return groups, []
        ties, shut = alike(groups)
        while shut:
            self.whole = (*self.whole, *shut)
            groups = self.coupled()
            ties, shut = alike(groups)
        return groups, _merged([*ties, *self.request.ties(groups)])

    def attempt(self, proof: Proof, scores: Scores, ratios: Mapping[int, float], draft: bool) -> _Attempt:
        kept, edits, unsolved = self.chosen(scores, ratios)
        wrong, faults = proof.judge(self.groups, kept, edits, unsolved, draft)
        if wrong and self.request.plain:
            kept, edits, unsolved = _widened(self.graph, self.groups, self.request, scores, ratios, self.ties, (kept, edits, unsolved), wrong)
            along = [(each, _along(self.graph, self.groups, each)) for each in wrong]
            whole = {group.index for group, stay in zip(self.groups, kept, strict=True) if len(stay) == group.size}
            self.notes += [f"note: {why(each)}" for each, indices in along if indices and indices <= whole]
            wrong, faults = proof.judge(self.groups, kept, edits, unsolved, draft)
        return _Attempt(kept, edits, wrong, faults)

    def chosen(self, scores: Scores, ratios: Mapping[int, float]) -> tuple[Kept, dict, list[Wrong]]:
        """The units that stay, new values of attributes, and sizes that these do not give; groups whose widths the code derives from each other are tied."""
        while True:
            kept = choose(self.groups, scores, self.request, ratios, self.ties)
            edits, unsolved = solve(self.graph, Survivors(self.groups, kept).length)
            closer = _tie(self.graph, self.groups, unsolved, self.ties)
            if closer == self.ties:
                return kept, edits, unsolved
            self.ties = closer

    def learn(self, wrong: Sequence[Wrong], faults: Sequence[Fault]) -> None:
        """Join the axes that give a size together where that may help, else leave them whole; and couple the groups anew."""
        for each in wrong:
            pairs = shares(each.call, self.graph.symbols) if each.call and _key(each) not in self.tied else []
            self.tied.add(_key(each))
            self.joins += pairs
            if not pairs:
                self.locks += _locks(self.graph, each, _key(each) in self.locked)
                self.locked.add(_key(each))
                self.notes.append(f"note: {why(each)}")
        for fault in faults:
            self.locks.append((fault.labels, fault.text))
            self.notes.append(f"note: {fault.text}")
            self.request.faults.append((self.graph, fault))
        self.groups, self.ties = self.uniform(self.coupled())


def _merged(ties: list[frozenset[int]]) -> list[frozenset[int]]:
    """Ties that share a group are one."""
    merged: list[frozenset[int]] = []
    for tie in ties:
        touching = [other for other in merged if other & tie]
        merged = [other for other in merged if not other & tie] + [tie.union(*touching)]
    return merged


def _locks(graph: Graph, wrong: Wrong, parted: bool = False) -> list[tuple[Array, str]]:
    """What has to stay because of a size that is wrong, with the reason.

    ``parted``: its own axes are whole, and what they are parted by (a number of heads) has to stay as well.
    """
    need, text, locks = wrong.need, why(wrong), []
    if need and _literal_part(need, wrong.expr):  # what lies beyond it may go
        return [(np.moveaxis(field, need.dim, 0)[_part(need)], text) for field in need.value.fields if field.shape[need.dim] > 1]
    for value, dim in [*_places(graph, need, wrong.expr), *(_behind(graph, wrong.expr) if parted else ())]:
        for field in value.fields:
            over = varying(field)
            if dim in over and len(over) > 1:  # so many slices have to be there, whatever is left of each
                field = graph.labels.marginal(field.reshape([field.shape[axis] for axis in over]), (over.index(dim),))
            if dim in over:
                locks.append((field, text))
    return locks


def why(wrong: Wrong) -> str:
    """What cannot follow a width, in words, with the place in the code."""
    if wrong.call:
        where = ", ".join(part for part in (wrong.call.module, wrong.call.line) if part)
        return f"no attribute behind the size given to {wrong.call.op} ({where})"
    where = f" ({os.path.basename(wrong.where[0])}:{wrong.where[1]})" if wrong.where else ""
    return f"a factor or a branch depends on this size{where}"


def choose(groups: Groups, scores: Scores, request: Request, ratios: Mapping[int, float], ties: Sequence[frozenset[int]]) -> Kept:
    """The units that stay, by a ratio or under the limits that the request set."""
    step = request.multiple_of if isinstance(request.multiple_of, int) else request.multiple_of(groups)
    rules = {"scope": request.scope, "multiple_of": step, "min_units": _least(groups, request), "ratios": ratios, "ties": ties}
    if not request.extra_costs and not request.aims.any:
        if request.scope == "allocated":
            raise BadTarget("scope='allocated' chooses widths under a budget; give one of params, macs, size, memory, latency, speedup")
        if isinstance(step, int):
            return select(groups, scores, request.ratio, **rules)
    known = priced(groups, {name: make for name, (_, make) in request.extra_costs.items()})
    asked = request.aims.limits(known.full) | {name: limit for name, (limit, _) in request.extra_costs.items()}
    return fit(groups, scores, asked, known, request.ratio, **rules, time=request.aims.weight)


def _least(groups: Groups, request: Request) -> int | dict[int, int]:
    """How many units stay in any case: what is asked for, and as many experts as are chosen."""
    enough = least(groups, groups.graph.choices)
    if not enough:
        return request.widths.at_least
    return {group.index: max(request.widths.at_least, enough.get(group.index, 1)) for group in groups}


def _widened(
    graph: Graph,
    groups: Groups,
    request: Request,
    scores: Scores,
    ratios: Mapping[int, float],
    ties: list,
    plan: tuple[Kept, dict, list[Wrong]],
    wrong: list[Wrong],
) -> tuple[Kept, dict, list[Wrong]]:
    """Where the sizes ``wrong`` cannot follow a width, the next larger one with which they can (so that a larger ratio never leaves more)."""
    kept, edits, unsolved = plan
    right = {_key(each) for each in unsolved} - {_key(each) for each in wrong}  # what the code itself gets right
    ratios = dict(ratios)
    for _ in range(2 * len(wrong)):
        if not wrong:
            break
        along = sorted(_along(graph, groups, wrong[0]))
        if not along:
            return plan
        size, width = max((groups.groups[index].size, len(kept[index])) for index in along)
        for wider in range(width + 1, size, max(1, (size - width) // TRIES)):
            trial = ratios | {index: 1 - wider / size for index in along}
            wide = choose(groups, scores, request, trial, ties)
            changed, remaining = solve(graph, Survivors(groups, wide).length)
            still = [each for each in remaining if _key(each) not in right]
            if len(still) < len(wrong):
                ratios, kept, edits, unsolved, wrong = trial, wide, changed, remaining, still
                break
        else:
            return plan
    return kept, edits, unsolved


def _key(wrong: Wrong) -> tuple:
    """The same for the same use of a size, whatever the widths."""
    call = wrong.call
    if not call:
        return wrong.at, wrong.where or id(wrong.expr)
    return call.op, call.since, call.until, call.need.kind, id(call.need.value), call.need.dim, call.need.at


def _tie(graph: Graph, groups: Groups, wrong: list, ties: list[frozenset[int]]) -> list[frozenset[int]]:
    """Groups whose widths the code derives from each other have to keep the same share."""
    for need, expr, *_ in wrong:
        if need is None or _literal_part(need, expr):
            continue
        dims = [(leaf[1], leaf[2]) for leaf in leaves(expr) if leaf[0] == "dim"]
        # One attribute (of a configuration that layers share) stands for several axes.
        places = [(need.value, need.dim), *(dims or _behind(graph, expr))]
        members = frozenset(index for value, dim in places for index in groups.along(value, dim))
        if len(members) < 2 or any(members <= tie for tie in ties):
            continue
        touching = [tie for tie in ties if tie & members]
        ties = [tie for tie in ties if not tie & members] + [members.union(*touching)]
    return ties


def _literal_part(need: Any, expr: Any) -> bool:
    """Whether a number in the code says how much lies before a position, or behind it."""
    return need is not None and isinstance(expr, int) and need.kind in ("before", "after")


def _part(need: Any) -> slice:
    """The positions before or behind the one that a need speaks of."""
    return slice(need.at) if need.kind == "before" else slice(need.value.shape[need.dim] - need.at, None)


def _along(graph: Graph, groups: Groups, wrong: Wrong) -> set[int]:
    """The groups whose widths decide whether a size is right."""
    need = wrong.need
    if need is not None and _literal_part(need, wrong.expr):
        fields = [np.moveaxis(field, need.dim, 0)[_part(need)] for field in need.value.fields if field.shape[need.dim] > 1]
        return {int(index) for field in fields for index in np.unique(groups.owner[groups.root[field]]) if index >= 0}
    return {index for value, dim in _places(graph, need, wrong.expr) for index in groups.along(value, dim)}


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
