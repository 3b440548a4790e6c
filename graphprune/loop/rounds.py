"""What each round's cut is asked for: :class:`Way`, from a target and a schedule; everything is counted on the original.

A round asks for what should be left of the original then, not for a share of what the round before left: errors of
single rounds do not add up. Times are measured anew before every cut, the model in work against the original.

>>> import torch
>>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> way = plan_way(net, ((torch.zeros(1, 4),), {}), {"params": 20}, 2, "linear", {})
>>> way.demand(1, net, Plan({}, {})), way.demand(2, net, Plan({}, {}))
({'params': 39}, {'params': 20})
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..budget.targets import Aims, limits
from ..cost import NAMES, profile
from ..coupling.groups import Groups, couple
from ..cutting.plan import Plan
from ..errors import BadLoop, LessThanAsked
from ..granularity.spec import Spec, parse
from ..names import named, overrides
from ..options import Runtime, Widths
from ..select import check_ratio
from ..shrink import plan
from ..timing.latency import Stopwatch
from ..tracing.trace import trace
from .schedule import share, toward

TIMES = ("latency", "speedup")
KINDS = ("ratio", *NAMES, *TIMES)


@dataclass(frozen=True)
class Way:
    """The target's kind, the share of the original that is removed at the end, and how it is approached.

    ``full`` is what the original costs (of the kinds that are counted), ``options`` go to every cut.
    """

    original: nn.Module
    example: tuple[tuple[Any, ...], dict[str, Any]]
    kind: str
    final: float
    full: float
    steps: int
    schedule: str
    options: Mapping[str, Any]

    def removed(self, number: int) -> float:
        """The share of the original that should be gone after a round."""
        return share(self.final, number, self.steps, self.schedule)

    def demand(self, number: int, model: nn.Module, plan: Plan) -> dict[str, Any]:
        """The options of this round's cut of ``model``, which ``plan`` made from the original."""
        if self.kind == "ratio":
            return self._ratio(number, model, plan)
        remaining = 1 - self.removed(number)
        options = {**self.options, **self._apart(number, model, plan)}
        if self.kind in TIMES:
            now = _watch(self.original, self.example, self.options)(model).share if number > 1 else 1.0
            return {**options, "latency": min(1.0, remaining / now)}
        return {**options, self.kind: math.floor(remaining * self.full * (1 + 1e-12))}

    def _apart(self, number: int, model: nn.Module, plan: Plan) -> dict[str, Any]:
        """The ratios that single groups have beside a budget: each is approached as well, not taken anew in every round."""
        widths = widths_of(self.options)
        if not isinstance(widths.ratios, Mapping) or not widths.ratios:
            return {}
        spec = _spec(self.options)
        if not spec.coarse:
            return {"widths": self._finer(number, spec.masks)["widths"]}

        def shares(groups: Groups) -> dict[int, tuple[float, float]]:
            return {index: self._steps(number, final) for index, final in overrides(groups, model, widths.ratios).items()}

        return {"widths": replace(widths, ratios=toward(plan, shares))}

    def _steps(self, number: int, final: float) -> tuple[float, float]:
        """The shares that should be gone after this round and after the one before, where ``final`` is that at the end."""
        return share(final, number, self.steps, self.schedule), share(final, number - 1, self.steps, self.schedule)

    def _ratio(self, number: int, model: nn.Module, plan: Plan) -> dict[str, Any]:
        now, last = self.removed(number), self.removed(number - 1)
        what = self.options.get("what", "channel")
        if not isinstance(what, str):
            return {**self.options, "ratio": 1 - (1 - now) / (1 - last)}
        spec = parse(what)
        if not spec.coarse:
            return {**self.options, **self._finer(number, spec.masks)}
        widths, ranked = widths_of(self.options), self.options.get("scope", "layer") != "layer"

        def shares(groups: Groups) -> dict[int, tuple[float, float]]:
            ratios = overrides(groups, model, widths.ratios)
            finals = {index: ratios.get(index, self.final) for index in (ratios if ranked else range(len(groups)))}
            return {index: self._steps(number, final) for index, final in finals.items()}

        ratio = 1 - (1 - now) / (1 - last)
        if ranked:
            total, remaining = self._units(self.original), self._units(model)
            ratio = max(0.0, 1 - (1 - now) * total / remaining)
        return {**self.options, "ratio": ratio, "widths": replace(widths, ratios=toward(plan, shares))}

    def _finer(self, number: int, masks: bool) -> dict[str, Any]:
        """Ratios of a granularity that cuts no axes: masked entries are still there and counted again, what is gone is not."""

        def at(final: float) -> float:
            now, last = self._steps(number, final)
            return now if masks else 1 - (1 - now) / (1 - last)

        widths = widths_of(self.options)
        finals = widths.ratios if isinstance(widths.ratios, Mapping) else {}
        return {"ratio": at(self.final), "widths": replace(widths, ratios={key: at(final) for key, final in finals.items()})}

    def _units(self, model: nn.Module) -> int:
        graph = trace(model, *self.example)
        whole = tuple((name, None) for name in named(model, self.options.get("keep", ())) if name in graph.leaves)
        return sum(group.size for group in couple(graph, whole))


def pick_target(target: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The one target, from the argument or taken out of the keywords: ``{"macs": 0.5}``; a ratio of 0.5 where nothing is said."""
    targets = {name: options.pop(name) for name in KINDS if name in options}
    targets |= target if isinstance(target, Mapping) else {} if target is None else {"ratio": target}
    if len(targets) > 1 or set(targets) - set(KINDS):
        raise BadLoop(f"the target is {targets}; give one of {', '.join(KINDS)}")
    return targets or {"ratio": 0.5}


def plan_way(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], target: Mapping[str, Any], steps: int, schedule: str, options: Mapping[str, Any]
) -> Way:
    """Check the target against the original. Raises :class:`~graphprune.errors.BadRatio` (:class:`~graphprune.errors.BadTarget`)."""
    ((kind, value),) = target.items()
    share(0.5, 1, steps, schedule)
    if kind == "ratio":
        return Way(model, example, kind, check_ratio(value), 0.0, steps, schedule, options)
    if kind in TIMES:
        aims = _aims(options, {kind: value})
        seconds = _watch(model, example, options)(model).seconds if isinstance(value, str) else 0.0
        return Way(model, example, kind, 1 - min(1.0, aims.share(seconds)), 0.0, steps, schedule, options)
    costs = profile(model, *example)
    _reach(model, example, {kind: value}, options)
    full = getattr(costs, kind)
    return Way(model, example, kind, max(0.0, 1 - limits(costs, {kind: value})[kind] / full), full, steps, schedule, options)


def _reach(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], target: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise now, not after hours of training, when the rules leave too much; which units would go does not matter for that."""
    rules = {name: value for name, value in options.items() if name not in ("score", "repair", "verify")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LessThanAsked)
        plan(model, example[0], example_kwargs=example[1], **{**rules, **target})


def _aims(options: Mapping[str, Any], target: Mapping[str, Any]) -> Aims:
    on = options.get("on") or Runtime()
    return Aims(**target, runtime=on.name, threads=on.threads, measure=on.measure, objective=on.objective)


def _watch(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], options: Mapping[str, Any]) -> Stopwatch:
    return Stopwatch(model, trace(model, *example), _aims(options, {"latency": 1.0}))


def _spec(options: Mapping[str, Any]) -> Spec:
    what = options.get("what", "channel")
    return parse(what if isinstance(what, str) else next(iter(what)))


def widths_of(options: Mapping[str, Any]) -> Widths:
    """The rules for single groups among the options of :func:`graphprune.shrink`."""
    asked = options.get("widths")
    return asked if isinstance(asked, Widths) else Widths(to=asked or {})
