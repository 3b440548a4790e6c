"""The plan for fewer experts where they are modules of a list (:mod:`graphprune.tracing.members`): :func:`plan_listed`.

The router's rows are cut, the modules leave their lists, and what the code counts them by follows. All mixtures keep the same share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..cost import cost
from ..coupling.groups import Groups, couple
from ..cutting.apply import apply
from ..cutting.outline import Totals
from ..cutting.parts import Part
from ..cutting.plan import Plan, Survivors, make_plan
from ..cutting.verify import check
from ..errors import BadRatio, BadTarget, NotEqual, NothingToPrune
from ..operations.labels import Array
from ..scores import Score, Scores, score
from ..select import Kept
from ..tracing.graph import Graph
from ..tracing.members import LISTED, Mixture, places
from ..tracing.symbols import solve
from ..tracing.trees import leaf_tensors
from .limits import holds, reached, unmet
from .request import Request
from .unread import unread_sizes
from .wanted import amounts
from .widths import choose, why

POWERS = {"l1": 1, "l2": 2}
Path = tuple


def coupled(graph: Graph, keep: Sequence[str | tuple[str, int]] = ()) -> Groups:
    """The groups of a run in which the experts of its lists alone may go: one for the routers of each mixture, or of several that go together.

    A router of which ``keep`` names a tensor stays whole.
    """
    labels = graph.labels
    root = labels.partition().parent
    chosen = [choice for mixture in graph.mixtures for choice in mixture.choices]
    free = np.zeros(len(root), dtype=bool)
    if chosen:
        free[root[np.concatenate([choice.labels for choice in chosen])]] = True
    others = np.flatnonzero(~free[root])
    locks = [(array, reason) for array, reason in labels.locks if labels.reasons[reason].text != LISTED]
    whole = tuple(each if isinstance(each, tuple) else (each, None) for each in keep)
    kept = tuple((name, axis) for name, axis in whole if name in graph.leaves)
    return couple(replace(graph, labels=replace(labels, locks=locks), choices=chosen), kept, locks=((others, "only experts are cut"),))


def mixtures_of(groups: Groups) -> Mapping[int, tuple[Mixture, ...]]:
    """The mixtures whose experts are the units of each group, by the number of the group."""
    found: dict[int, tuple[Mixture, ...]] = {}
    for mixture in groups.graph.mixtures:
        owners = {int(index) for index in groups.owner[groups.root[mixture.choices[0].labels]]}
        if len(owners) == 1 and min(owners) >= 0:
            index = owners.pop()
            found[index] = (*found.get(index, ()), mixture)
    return found


def plan_listed(graph: Graph, model: nn.Module, request: Request) -> Plan:
    """The plan for fewer experts in lists.

    Raises :class:`~graphprune.errors.NothingToPrune` where something else holds them, :class:`~graphprune.errors.BadRatio` for a number that cannot be, and
    :class:`~graphprune.errors.BadTarget` for targets that they cannot meet.
    """
    if request.aims.timed or request.aims.weight:
        raise BadTarget("a time is met by widths alone; give the experts an amount (what={'experts': 6}), or ask for params= or macs=")
    groups = coupled(graph, request.keep)
    mixtures = mixtures_of(groups)
    if not mixtures:
        raise NothingToPrune(f"the experts stay whole: {_held(groups)}")
    scores = _kept_last(groups, model, request, mixtures, _scores(groups, model, request, mixtures))
    ties = [frozenset(range(len(groups)))] if request.widths.uniform and len(groups) > 1 else []
    limits = request.limits(graph, ("params", "macs"))
    plain = replace(request, aims=replace(request.aims, params=None, macs=None), scope="layer" if limits else request.scope)
    ratios = amounts(groups, request)
    kept = choose(groups, scores, plain, ratios, ties)
    remarks: tuple[str, ...] = ()
    if limits and not ratios:
        kept, costs = _within(groups, model, plain, scores, ties, limits)
        remarks = tuple(reached(costs, limits))
    _keeps_all(scores, kept)
    plan = _checked(groups, model, kept)
    return replace(plan, remarks=(*remarks, *plan.remarks))


def _kept_last(groups: Groups, model: nn.Module, request: Request, mixtures: Mapping[int, tuple[Mixture, ...]], scores: Scores) -> Scores:
    """The scores, without bound for an expert of which a tensor is to be kept."""
    names = {each for each in request.keep if isinstance(each, str)}
    for index, several in mixtures.items():
        scores[index] = scores[index].detach().clone().double()
        for mixture in several:
            units = _unit_of(groups, index, mixture)
            for path in mixture.lists:
                for entry, key in enumerate(places(model.get_submodule(path))):
                    if any(f"{path}.{key}.{name}" in names for name, _ in model.get_submodule(f"{path}.{key}").named_parameters()):
                        scores[index][int(units[entry])] = torch.inf
    return scores


def _keeps_all(scores: Scores, kept: Kept) -> None:
    """Raises :class:`~graphprune.errors.BadRatio` where experts would go that are to be kept."""
    for values, stays in zip(scores, kept, strict=True):
        asked = int(values.isinf().sum())
        if asked > int(values[stays].isinf().sum()):
            raise BadRatio(f"{len(stays)} experts are to stay, and keep= names {asked}; ask for {asked} or more, or keep fewer")


def _held(groups: Groups) -> str:
    """What keeps the experts whole."""
    if not groups.graph.mixtures:
        return "no list of modules of this model is called by what a router chooses"
    roots = {int(label) for mixture in groups.graph.mixtures for label in groups.root[mixture.choices[0].labels]}
    for (name, axis), reason in groups.locked.items():
        for entries in groups.graph.leaves[name].fields:
            if entries.shape[axis] > 1 and roots & {int(label) for label in groups.root[entries].ravel()}:
                return str(reason)
    return "they stay or go together with something else"


def _scores(groups: Groups, model: nn.Module, request: Request, mixtures: Mapping[int, tuple[Mixture, ...]]) -> Scores:
    """How much every expert matters: the norm of all its weights, or what another score says of the router's rows."""
    name = request.score.name if isinstance(request.score, Score) else request.score
    scores = list(score(groups, model, request.score, request.batches, request.loss))
    power = POWERS.get(name) if isinstance(name, str) else None
    if power is None or any(tensor.is_meta for tensor in model.parameters()):
        return scores
    for index, several in mixtures.items():
        totals = torch.zeros(groups[index].size, dtype=torch.float64)
        for mixture in several:
            units = _unit_of(groups, index, mixture)
            for path in mixture.lists:
                for entry, tensors in enumerate(_modules(model, path)):
                    totals[int(units[entry])] += sum(float(tensor.detach().double().abs().pow(power).sum()) for tensor in tensors.parameters())
        scores[index] = totals ** (1 / power)
    return scores


def _unit_of(groups: Groups, index: int, mixture: Mixture) -> Array:
    """The unit of every expert."""
    numbers = {int(label): unit for unit, label in enumerate(groups[index].units)}
    return np.array([numbers[int(label)] for label in groups.root[mixture.choices[0].labels]])


def _modules(model: nn.Module, path: str) -> Iterator[nn.Module]:
    holder = model.get_submodule(path)
    return (child for key in places(holder) if (child := holder._modules[key]) is not None)


def _within(
    groups: Groups, model: nn.Module, request: Request, scores: Scores, ties: list[frozenset[int]], limits: Mapping[str, float]
) -> tuple[Kept, dict[str, float]]:
    """The largest share of the experts with which the limits hold; raises :class:`~graphprune.errors.BadTarget` where none does."""
    most = max(group.size for group in groups)
    costs: dict[str, float] = {}
    for gone in range(most):
        kept = choose(groups, scores, replace(request, ratio=gone / most), {}, ties)
        costs = dict(_costs(groups, model, kept)._asdict())
        if holds(costs, limits):
            return kept, costs
    raise unmet(costs, limits, "experts")


def _gone(groups: Groups, model: nn.Module, kept: Kept) -> list[str]:
    """The modules that leave their lists."""
    stays = Survivors(groups, kept).stays
    paths = []
    for several in mixtures_of(groups).values():
        for mixture in several:
            away = np.flatnonzero(~stays[mixture.choices[0].labels])
            paths += [f"{path}.{places(model.get_submodule(path))[entry]}" for path in mixture.lists for entry in away]
    return list(dict.fromkeys(paths))


def _costs(groups: Groups, model: nn.Module, kept: Kept) -> Totals:
    """What is left of parameters and MACs."""
    gone = tuple(f"{path}." for path in _gone(groups, model, kept))
    plan = make_plan(groups, kept, {}, ())
    assert plan.outline is not None
    return _without(plan, groups.graph, gone)


def _without(plan: Plan, graph: Graph, gone: tuple[str, ...]) -> Totals:
    """The totals of a plan less what lies in modules that go."""
    assert plan.outline is not None
    params = sum(int(np.prod(shape)) for name, shape in plan.outline.shapes.items() if name.startswith(gone)) if gone else 0
    idle = tuple(path for path in gone if not path.startswith(_routed(graph)))  # tokens that are routed go to those that stay instead
    macs = sum(node.macs for node in graph.nodes if f"{node.module}.".startswith(idle)) if idle else 0
    return Totals(plan.outline.after.params - params, plan.outline.after.macs - macs)


def _routed(graph: Graph) -> tuple[str, ...]:
    """The lists of which every token visits as many experts as are chosen, however many there are; else each expert works on all tokens."""
    routed: list[str] = []
    for mixture in graph.mixtures:
        chosen = [value for node in graph.nodes for value in node.outs if any(value.numbers is choice for choice in mixture.choices)]
        visits = math.prod(chosen[0].shape) if chosen else 0
        for path in mixture.lists:
            rows: dict[str, int] = {}  # of the first product of every expert
            for node in graph.nodes:
                if node.products and node.module.startswith(f"{path}."):
                    rows.setdefault(node.module.removeprefix(f"{path}.").partition(".")[0], math.prod(node.outs[0].shape[:-1]))
            if sum(rows.values()) == visits and len(rows) <= mixture.choices[0].labels.size:
                routed.append(f"{path}.")
    return tuple(routed)


def _checked(groups: Groups, model: nn.Module, kept: Kept) -> Plan:
    """The plan, once the cut model runs and computes what the original does that never chooses what is gone."""
    graph = groups.graph
    edits, wrong = solve(graph, Survivors(groups, kept).length)
    certain = [each for each in wrong if each.certain]
    if certain:
        raise NothingToPrune(f"the experts stay whole: {why(certain[0])}")
    more, notes = unread_sizes(graph, model, groups, kept)
    counted = _counted(groups, kept)
    notes = _but(notes, {".".join(filter(None, path)) for path in counted})
    trials = [{**edits, **more, **counted}, *([{**edits, **more}] if counted else [])]
    if any(tensor.is_meta for *_, tensor in leaf_tensors(model)):
        return _plan(groups, model, kept, trials[0], notes)
    failed: Exception | None = None
    for trial in trials:
        plan = _plan(groups, model, kept, trial, notes)
        try:
            check(graph, model, apply(model, plan), plan)
            return plan
        except NotEqual as error:
            failed = failed or error
    raise NothingToPrune(f"the experts stay whole: the code does something else with fewer modules in the list: {failed}")


def _but(notes: Sequence[str], names: set[str]) -> list[str]:
    """The notes, but for what they say of attributes that follow after all."""
    return [note for note in notes if not any(f" {name} = " in note for name in names)]


def _counted(groups: Groups, kept: Kept) -> dict[Path, int]:
    """The attributes around a list that say how many experts there are, though no call is given them (``range(self.num_experts)``).

    They are known by their name, or by having become plain numbers in the run.
    """
    counts: dict[Path, set[int]] = {}
    read = {doubt.expr[1] for doubt in groups.graph.doubts if not isinstance(doubt.expr, int) and doubt.expr[0] == "attr"}
    read |= {path for path in groups.graph.symbols if isinstance(path[-1], str) and "expert" in path[-1]}
    for index, several in mixtures_of(groups).items():
        for mixture in several:
            size = mixture.choices[0].labels.size
            left = size * len(kept[index]) // groups[index].size
            for path in read:
                if groups.graph.symbols.get(path) == size and any(f"{holder}.".startswith(f"{path[0]}." if path[0] else "") for holder in mixture.lists):
                    counts.setdefault(path, set()).add(left)
    return {path: lengths.pop() for path, lengths in counts.items() if len(lengths) == 1}


def _plan(groups: Groups, model: nn.Module, kept: Kept, edits: Mapping[Path, int], notes: Sequence[str]) -> Plan:
    plan = make_plan(groups, kept, dict(edits), tuple(dict.fromkeys(notes)))
    gone = _gone(groups, model, kept)
    assert plan.outline is not None
    after = _without(plan, groups.graph, tuple(f"{path}." for path in gone))
    return replace(plan, parts=tuple(Part("expert", path, None) for path in gone), outline=replace(plan.outline, after=after))


def unit_costs(groups: Groups, model: nn.Module, index: int) -> tuple[float, float]:
    """Parameters and MACs of one expert of a group, on average, with its row of the router."""
    keep_all = [torch.arange(group.size) for group in groups]
    full = cost(groups)
    one = [*keep_all[:index], keep_all[index][:-1], *keep_all[index + 1 :]]
    after = _costs(groups, model, one)
    return float(full.params - after.params), float(full.macs - after.macs)
