"""Several kinds of unit in one plan: whole modules first, then widths, then entries, each planned on what those before it leave.

Under a ratio every kind loses that share (or what the request says for it). Under a budget they share *one* ratio, found by bisection over plans of all kinds:
all but the last lose the largest share (of 32 steps) at which the budget does not yet hold, and the last takes what is still asked for, so that the budget is
met as closely as its units allow. One ratio is the rule that needs no common scale: a score of a layer and a score of a channel cannot be compared, a share
of each can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..cost import NAMES, cost
from ..coupling.groups import couple
from ..cutting.apply import apply
from ..cutting.compose import compose
from ..cutting.parts import GONE
from ..cutting.plan import Plan
from ..errors import BadTarget, UnknownName
from ..granularity.weights import weights
from ..names import named
from ..tracing.copies import duplicate
from ..tracing.graph import Graph
from ..tracing.trace import trace
from ..tracing.trees import leaf_tensors
from .limits import holds, unmet
from .request import Request

STEPS = 32  # the shared ratio is one of this many steps from 0 to 1
PlanOne = Callable[[Graph, nn.Module, Request], Plan]


def together(graph: Graph, model: nn.Module, stages: Sequence[Request], plan_one: PlanOne) -> Plan:
    """One plan for all stages; raises :class:`~graphprune.errors.BadTarget` where a target cannot be met, or has nothing to choose."""
    aims, chain = stages[0].aims, Chain(graph, model, plan_one)
    if not aims.any:
        return chain.plan(stages)
    free = [index for index, stage in enumerate(stages) if not _decided(stage)]
    if not free:
        raise BadTarget("every kind in what= has an amount of its own, so that a target has nothing to choose; leave one of the amounts, or the target, out")
    timed, last = aims.timed or aims.weight, len(stages) - 1
    if timed and (free != [last] or not stages[last].spec.coarse):
        raise BadTarget('a time is met by widths alone: give every other kind an amount (what={"mlp": None, "layers": 24}), or ask for params= or macs=')
    if timed or free == [last]:
        return chain.plan([*(_open(stage) for stage in stages[:last]), stages[last] if timed else _absolute(stages[last], graph)])
    limits = aims.limits(cost(couple(graph)))
    unmet_by: BadTarget | None = None
    for ratio in _shared(chain, stages, limits):
        others = [_open(stage, ratio) for stage in stages[:last]]
        try:
            plan = chain.plan([*others, _absolute(stages[last], graph) if last in free else _open(stages[last], ratio)])
        except BadTarget as error:
            unmet_by = error  # the last kind alone does not meet it: a larger share of the others may
            continue
        lines = (f"{' and '.join(stage.text for stage in stages)} under one budget: {ratio:.1%} of each, and of {stages[last].text} what is still asked for",)
        return replace(plan, remarks=(*lines, *plan.remarks))
    raise unmet_by or BadTarget("no share of the kinds in what= meets the targets")


def _decided(stage: Request) -> bool:
    """Whether a stage itself says how much goes of every kind, so that a target has nothing to choose."""
    return all(each.amount is not None or each.spec.says_itself for each in stage.wanted)


def _open(stage: Request, ratio: float = 0.0) -> Request:
    """A stage without targets, which removes at least a ratio."""
    aims = replace(stage.aims, **dict.fromkeys((*NAMES, "latency", "speedup", "measure")), objective="score")
    return replace(stage, aims=aims, ratio=stage.ratio if _decided(stage) else max(ratio, stage.ratio))


def _absolute(stage: Request, graph: Graph) -> Request:
    """A stage whose targets are counted on the original, whatever the stages before it leave."""
    limits = stage.aims.limits(cost(couple(graph)))
    return replace(stage, aims=replace(stage.aims, **{name: math.floor(limit * (1 + 1e-12)) for name, limit in limits.items()}))


def _shared(chain: Chain, stages: Sequence[Request], limits: dict[str, float]) -> tuple[float, ...]:
    """The shared ratios from the last at which the limits do not hold yet, in order; raises :class:`~graphprune.errors.BadTarget` where they never do.

    Plans are drafted to find it, and what is planned in earnest may remove a little less: so there are more than two.
    """

    def spent(step: int) -> dict[str, float]:
        return chain.costs([_drafted(_open(stage, _ratio(step))) for stage in stages])

    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(spent(middle), limits) else (middle, high)
    if high == STEPS and not holds(least := spent(high), limits):
        raise unmet(least, limits, " and ".join(stage.text for stage in stages))
    return (_ratio(high),) if _decided(stages[-1]) else tuple(_ratio(step) for step in range(low, STEPS + 1))


def _ratio(step: int) -> float:
    return min(step / STEPS, 1 - 1e-9)


def _drafted(stage: Request) -> Request:
    """How many units go hardly depends on the scores where every group loses the same share: a trial does without them."""
    if not stage.spec.coarse or stage.scope != "layer":
        return stage
    return replace(stage, score=lambda groups, model, batches: [torch.zeros(group.size, dtype=torch.float64) for group in groups], batches=None, loss=None)


class Chain:
    """Plans of one model, each stage on what the stages before it leave."""

    def __init__(self, graph: Graph, model: nn.Module, plan_one: PlanOne) -> None:
        self.graph, self.model, self.plan_one = graph, model, plan_one

    def plan(self, stages: Sequence[Request]) -> Plan:
        return self._run(stages)[0]

    def costs(self, stages: Sequence[Request]) -> dict[str, float]:
        """What the model costs after all stages; entries that are masked count as gone."""
        _, graph, model = self._run(stages, measured=True)
        full = cost(couple(graph))
        costs = {name: float(getattr(full, name)) for name in NAMES}
        for weight in weights(graph, model)[0]:
            if weight.mask is not None:
                gone = int((~weight.mask).sum())
                costs["params"] -= gone
                costs["macs"] -= gone * weight.macs
        return costs

    def _run(self, stages: Sequence[Request], measured: bool = False) -> tuple[Plan, Graph, nn.Module]:
        graph, model, plan = self.graph, self.model, None
        for index, stage in enumerate(stages):
            step = self._step(graph, model, stage)
            plan = step if plan is None else compose(plan, step)
            if measured or index < len(stages) - 1:
                model = _cut(model, step)
                example, others = graph.example, graph.asked.others
                if step.tokens is not None:  # the cut model takes other ids; what further examples hold of them is not known
                    example, others = step.tokens.example(*example), ()
                graph = trace(model, *example, outputs=graph.asked.outputs, examples=others)
        assert plan is not None
        return plan, graph, model

    def _step(self, graph: Graph, model: nn.Module, stage: Request) -> Plan:
        """The plan of one stage; one that has nothing to remove leaves everything as it is where others do their part."""
        stage = replace(stage, widths=replace(stage.widths, ratios=_there(model, stage.widths.ratios), to=_there(model, stage.widths.to)))
        return self.plan_one(graph, model, stage)


def _there(model: nn.Module, keys: Any) -> Any:
    """The rules whose names still fit something: those for modules that are gone are gone as well. What is no table of names is left as it is."""
    if not isinstance(keys, Mapping):
        return keys
    cuts = {}
    for key, value in keys.items():
        try:
            named(model, [key] if not isinstance(key, int) else ())
        except UnknownName:
            continue
        cuts[key] = value
    return cuts


def _cut(model: nn.Module, plan: Plan) -> nn.Module:
    """The model as a plan leaves it; one that only removes modules shares its weights with the original."""
    if plan.cuts or any(part.kind not in GONE for part in plan.parts):
        return apply(model, plan)
    shared = {id(tensor): tensor for *_, tensor in leaf_tensors(model)}
    return apply(duplicate(model, shared), plan, inplace=True)
