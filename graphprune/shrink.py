"""The table of contents: trace, couple, score, select, plan, apply; and the check that the result is exact."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .apply import apply
from .budget import Chooser
from .compose import so_far
from .errors import BadModel, GraphpruneError, NotEqual, NothingToPrune, UnknownName
from .groups import Groups, couple
from .latency import reach, remembered, steps
from .plan import Plan, Survivors, make_plan
from .repair import after_cut, refill
from .rewrite import removed, spelled
from .scores import Criterion, Scores
from .scores.attempts import attempts
from .select import check_ratio
from .sizes import leaves
from .symbols import solve
from .targets import Aims
from .trace import Graph, trace
from .trees import leaf_tensors, modules_of, tensors
from .zeroed import zeroed


def shrink(
    model: nn.Module,
    example_input: Any,
    ratio: float | None = None,
    *,
    params: float | None = None,
    macs: float | None = None,
    size: float | None = None,
    memory: float | None = None,
    latency: float | str | None = None,
    speedup: float | None = None,
    runtime: str = "eager",
    threads: int | None = None,
    measure: Callable[[nn.Module], float] | None = None,
    criterion: Criterion = "l2",
    batches: Iterable | None = None,
    loss: Callable | None = None,
    scope: str = "layer",
    keep: Sequence[Any] | str = (),
    ratios: Mapping[Any, float] | None = None,
    multiple_of: int | str | None = None,
    min_units: int = 1,
    calibration: Iterable | None = None,
    repair: str | Sequence[str] = "auto",
    example_kwargs: dict | None = None,
    inplace: bool = False,
    return_plan: bool = False,
    verify: bool = True,
    rewrite: bool = True,
) -> Any:
    """A smaller model that computes what ``model`` computes with the removed units set to zero.

    ``example_input`` is a tensor, a tuple (positional) or a dict (keyword); ``ratio`` the share of units removed in
    every group, 0 <= ratio < 1 (default 0.5, and 0 when a target is given). Targets are upper limits and hold together:
    ``params``, ``macs``, ``size`` (bytes of the weights) and ``memory`` (peak bytes of the activations), each a float up
    to 1 (share of the original) or an absolute number. ``scope`` is ``"layer"`` (the same ratio everywhere), ``"global"``,
    ``"isomorphic"``, or ``"optimal"`` (the widths that keep the most score under the targets). ``criterion``, ``batches``
    and ``loss`` are those of :func:`graphprune.score`. With ``calibration`` (batches of inputs, no labels) the cut model is repaired;
    :func:`graphprune.repair` says which steps ``repair`` may name.
    ``keep`` leaves modules or parameters whole, by name, pattern, module type or predicate ``(name, module) -> bool``;
    ``ratios`` overrides the ratio by the same kinds of key. ``verify`` compares with :func:`zeroed` on the example. ``rewrite`` lets modules whose
    code holds a size as a literal come back as a ``torch.fx.GraphModule``, where that frees an axis (:mod:`graphprune.rewrite`).
    Raises the errors of :mod:`graphprune.errors`, and leaves ``model`` as it was.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> shrink(net, torch.zeros(1, 4), ratio=0.5)[0].out_features
    4
    """
    aims = Aims(params, macs, size, memory, latency, speedup, runtime, threads, measure)
    ratio = check_ratio((0.0 if aims.any else 0.5) if ratio is None else ratio)
    check_model(model)
    held = [model_part for model_part in named(model, keep)]
    graph = trace(model, example_input, example_kwargs)
    choose = Chooser(ratio, scope, steps(multiple_of, graph, aims), min_units, aims)
    scored = remembered(attempts(model, criterion, batches, loss))
    propose = lambda more: decide(graph, model, replace(choose, more=more), scored, held, ratios)  # noqa: E731
    if aims.timed:
        small, plan = reach(model, graph, aims, propose, scope)
    else:
        plan = best(graph, model, (choose, scored, held, ratios), rewrite, inplace)
        small = apply(model, plan)
    if verify:
        check(graph, model, small, plan)
    small, plan = after_cut(small, model, plan, calibration, repair, graph)
    if inplace:
        small = refill(apply(model, plan, inplace=True), small)
    small.__dict__["graphprune_plan"] = so_far(model, plan)
    return (small, plan) if return_plan else small


def decide(
    graph: Graph,
    model: nn.Module,
    choose: Chooser,
    scored: Callable[[Groups], Iterator[Scores]],
    keep: list[str],
    ratios: Mapping[Any, float] | None,
    literals: set[str] | None = None,
) -> tuple[Groups, list, Plan]:
    """Couple, score and select; whatever no attribute can express is left whole, with the reason.

    ``literals`` collects the modules whose code holds such a size as a literal.
    """
    locks: list = []
    notes: list[str] = []
    ties: list[frozenset[int]] = []
    whole = tuple((name, None) for name in keep if name in graph.leaves)
    groups = couple(graph, whole)
    for _ in range(40):
        if not len(groups):
            raise NothingToPrune(_nothing(groups))
        own = overrides(groups, model, ratios)
        # Within each group a draft without scores finds what no attribute can express; the weights are read for what is left.
        draft = [[torch.zeros(group.size) for group in groups]] if choose.scope == "layer" and not choose.aims.any else []
        for scores in itertools.chain(draft, scored(groups)):
            while True:
                kept = choose(groups, scores, own, ties)
                edits, wrong = solve(graph, Survivors(groups, kept).length)
                tied = _tie(groups, wrong, ties)
                if tied == ties:
                    break
                ties = tied
            if wrong:
                break
        else:
            return groups, kept, make_plan(groups, kept, edits, tuple(notes))
        for need, expr, call in wrong:
            if call and literals is not None and isinstance(call.expr, int):
                literals.add(call.module)
            text = f"no attribute behind the size given to {call.op} ({call.module}, {call.line})" if call else "a factor or a branch depends on this size"
            for value, dim in _places(graph, need, expr):
                locks += [(field, text) for field in value.fields if field.shape[dim] > 1]
            notes.append(f"note: {text}")
        groups, ties = couple(graph, whole, tuple(locks)), []
    raise NothingToPrune("sizes in the code contradict each other; the last ones: " + "; ".join(notes[-3:]))


def best(graph: Graph, model: nn.Module, options: tuple, rewrite: bool, inplace: bool) -> Plan:
    """The plan; where literals in the code hold axes back, the one for the rewritten code, if that frees more and proves right."""
    literals: set[str] = set()
    plan = nothing = None
    try:
        plan = decide(graph, model, *options, literals)[2]
    except NothingToPrune as error:
        if not rewrite or not literals or (inplace and "" in literals):
            raise
        nothing = error
    if not rewrite or not literals or (inplace and "" in literals):
        return plan
    paths = tuple(sorted(literals))
    try:
        other = spelled(model, paths)
        found = decide(trace(other, *graph.example), other, *options)[2]
        note = f"note: sizes are literals in the code of {', '.join(name or 'the model' for name in paths)}; it is rewritten as torch.fx.GraphModule"
        found = dataclasses.replace(found, rewrites=paths, notes=(*found.notes, note))
        check(graph, model, apply(model, found), found)
    except GraphpruneError as error:
        if plan is None:
            raise nothing from error
        return dataclasses.replace(plan, notes=(*plan.notes, f"note: not rewritten: {error}"))
    return found if plan is None or removed(found.shapes, found.cuts) > removed(plan.shapes, plan.cuts) else plan


def _tie(groups: Groups, wrong: list, ties: list[frozenset[int]]) -> list[frozenset[int]]:
    """Groups whose widths the code derives from each other have to keep the same share."""
    for need, expr, _ in wrong:
        if need is None:
            continue
        places = [(need.value, need.dim)] + [(leaf[1], leaf[2]) for leaf in leaves(expr) if leaf[0] == "dim"]
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


def check(graph: Graph, model: nn.Module, small: nn.Module, plan: Plan, tolerance: float | None = None) -> float:
    """The largest relative difference between the cut model and the zeroed original; raises NotEqual when too large."""
    args, kwargs = graph.example
    modes = [(module, module.training) for module in small.modules()]
    try:
        with torch.no_grad():
            small.eval()
            found = list(tensors(small(*args, **kwargs), torch.Tensor))
            wanted = zeroed(model, plan, graph)(*args, **kwargs)
    except Exception as error:
        raise NotEqual(f"the cut model does not run on the example: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    worst = 0.0
    for mine, theirs in zip(found, wanted, strict=True):
        if mine.shape != theirs.shape:
            raise NotEqual(f"an output has shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}")
        if mine.is_floating_point() and mine.numel() and not mine.is_meta:
            scale = float(theirs.double().abs().max()) or 1.0
            gap = float((mine.double() - theirs.double()).abs().max()) / scale
            limit = tolerance or {torch.float64: 1e-8, torch.float32: 1e-3}.get(mine.dtype, 5e-2)
            if not gap <= limit and bool(torch.isfinite(theirs).all()):
                raise NotEqual(f"the cut model differs from the zeroed original by {gap:.1e} (relative); verify=False skips this check")
            worst = max(worst, gap)
    return worst


def check_model(model: Any) -> None:
    """Refuse what cannot be cut, and say what to give instead."""
    if isinstance(model, torch.jit.ScriptModule):
        raise BadModel("the model is scripted (torch.jit); shrink the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise BadModel(f"the model is a {type(model).__name__}; an nn.Module is needed")
    if hasattr(model, "_orig_mod"):
        raise BadModel("the model is compiled; shrink model._orig_mod and compile the result")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise BadModel("the model is wrapped for parallel training; shrink model.module and wrap the result")
    devices = {tensor.device for _, _, _, tensor in leaf_tensors(model)}
    if len(devices) > 1:
        raise BadModel(f"the model lies on several devices ({', '.join(sorted(map(str, devices)))}); move it to one")
    for name, module in modules_of(model):
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise BadModel(f"{name or 'the model'} is quantised; shrink the floating-point model and quantise the result")


def named(model: nn.Module, keep: Any) -> list[str]:
    """The tensors that ``keep`` speaks of: names, patterns, module types or predicates."""
    wanted = [keep] if isinstance(keep, str | type) or callable(keep) else list(keep)
    modules, leaves_ = dict(model.named_modules()), [name for name, *_ in leaf_tensors(model)]
    found: list[str] = []
    for item in wanted:
        if isinstance(item, str):
            hits = [n for n in (*modules, *leaves_) if n and (n == item or fnmatch.fnmatchcase(n, item))]
            if not hits:
                near = difflib.get_close_matches(item, [*modules, *leaves_], 3)
                raise UnknownName(f"{item!r} fits no module or parameter; the nearest are {', '.join(near) or 'none'}")
        elif isinstance(item, type):
            hits = [name for name, module in modules.items() if isinstance(module, item)]
        elif isinstance(item, nn.Module):
            hits = [name for name, module in modules.items() if module is item]
        elif isinstance(item, Callable):
            hits = [name for name, module in modules.items() if item(name, module)]
        else:
            raise UnknownName(f"{item!r} is neither a name, a pattern, a module type nor a predicate")
        found += [leaf for leaf in leaves_ for hit in hits if not hit or leaf == hit or leaf.startswith(hit + ".")]
    return found


def overrides(groups: Groups, model: nn.Module, ratios: Mapping[Any, float] | Callable | None) -> dict[int, float]:
    """The ratio of every group that has one of its own; ``ratios`` may also be a function of the groups that returns just this."""
    if callable(ratios):
        return dict(ratios(groups))
    own: dict[int, float] = {}
    for key, ratio in (ratios or {}).items():
        check_ratio(ratio, f"the ratio of {key!r}")
        if isinstance(key, int):
            own[key] = ratio
            continue
        mine = set(named(model, [key]))
        for group in groups:
            if any(name in mine and axis == 0 for name, axis in group.places):
                own[group.index] = ratio
    return own


def _nothing(groups: Groups) -> str:
    sizes = {place: groups.graph.leaves[place[0]].shape for place in groups.locked}
    large = sorted(groups.locked.items(), key=lambda item: -torch.Size(sizes[item[0]]).numel())[:5]
    rows = [f"  {name} axis {axis}: {reason}" for (name, axis), reason in large]
    return "no axis of this model can be removed. The largest that stay whole:\n" + "\n".join(rows)
