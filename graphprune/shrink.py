"""The table of contents: trace, then couple, score, select and plan (:mod:`graphprune.planning`), apply, verify, repair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .budget.targets import Aims
from .cutting.apply import apply
from .cutting.compose import so_far
from .cutting.undo import undone
from .cutting.verify import check, check_model
from .granularity.spec import parse
from .names import named
from .planning.planner import decide
from .planning.request import Request
from .repair import after_cut, before_cut, refill
from .scores import Criterion
from .select import check_ratio
from .tracing.trace import trace


def shrink(
    model: nn.Module,
    example_input: Any,
    ratio: float | None = None,
    *,
    granularity: str = "channel",
    params: float | None = None,
    macs: float | None = None,
    size: float | None = None,
    memory: float | None = None,
    latency: float | str | None = None,
    speedup: float | None = None,
    runtime: str = "eager",
    threads: int | None = None,
    measure: Callable[[nn.Module], float] | None = None,
    objective: str | float = "score",
    criterion: Criterion = "l2",
    batches: Iterable | None = None,
    loss: Callable | None = None,
    scope: str | None = None,
    keep: Sequence[Any] | str = (),
    ratios: Mapping[Any, float] | None = None,
    multiple_of: int | str | None = None,
    min_units: int = 1,
    calibration: Iterable | None = None,
    repair: str | Sequence[str] | None = "auto",
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
    to 1 (share of the original) or an absolute number. ``scope`` is ``"layer"`` (the same ratio everywhere, the default without a time), ``"global"``,
    ``"isomorphic"``, or ``"optimal"`` (the widths that keep the most score under the targets, the default for a time or an ``objective``).
    ``objective="time"`` looks for the fastest widths that use a budget up (``macs=0.5``: the smallest predicted time at half the MACs, whatever
    the scores), a number between 0 ("score") and 1 ("time") weighs the two (0.5: score per time; :mod:`graphprune.budget.optimal`). ``criterion``, ``batches``
    and ``loss`` are those of :func:`graphprune.score`. With ``calibration`` (batches of inputs, no labels) the cut model is repaired;
    :func:`graphprune.repair` says which steps ``repair`` may name.
    ``granularity`` says what a unit is: "channel", "head", "block", "layer", "group", "group:box", "kernel", "vector", "weight", or n:m
    as in "2:4" (:mod:`graphprune.granularity.spec`). A ``criterion`` of your own is a function ``(groups, model, batches) -> tensors``
    for channels and heads, ``(name, module) -> float`` for blocks and layers, ``weight -> tensor`` for everything finer.
    ``keep`` leaves modules or parameters whole, by name, pattern, module type or predicate ``(name, module) -> bool``;
    ``ratios`` overrides the ratio by the same kinds of key. ``verify`` compares with :func:`zeroed` on the example. ``rewrite`` lets modules whose
    code holds a size as a literal come back as a ``torch.fx.GraphModule``, where that frees an axis (:mod:`graphprune.cutting.rewrite`).
    Raises the errors of :mod:`graphprune.errors`, and leaves ``model`` as it was.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> shrink(net, torch.zeros(1, 4), ratio=0.5)[0].out_features
    4
    """
    check_model(model)
    aims = Aims(params, macs, size, memory, latency, speedup, runtime, threads, measure, objective)
    ratio = check_ratio((0.0 if aims.any else 0.5) if ratio is None else ratio)
    spec, held = parse(granularity), named(model, keep)
    request = Request(spec, aims, ratio, scope or aims.scope, criterion, batches, loss, held, ratios, multiple_of, min_units, rewrite, inplace)
    calibration = before_cut(model, calibration, repair)
    graph = trace(model, example_input, example_kwargs)
    plan = decide(graph, model, request)
    small = apply(model, plan)
    if verify:
        check(graph, model, small, plan)
    small, plan = after_cut(small, model, plan, calibration, repair, graph)
    if inplace:
        with undone(model, plan.edits):
            small = refill(apply(model, plan, inplace=True), small)
    small.__dict__["graphprune_plan"] = so_far(model, plan)
    return (small, plan) if return_plan else small
