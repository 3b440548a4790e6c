"""Whether the code of the cut model does what a plan promises, and what is to blame where it does not: :class:`Proof`.

Sizes that no attribute makes right mostly are right all the same, for the code reads shapes again whenever it runs. So the cut model is run without
values and compared call by call (:mod:`graphprune.tracing.rehearsal`); only what proves wrong is left whole. With ``values`` the real cut model is
compared with the zeroed original, result by result: that finds the axis where the two part.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..coupling.groups import Groups
from ..cutting.apply import apply
from ..cutting.plan import Plan, Survivors, make_plan
from ..cutting.verify import check
from ..cutting.zeroed import Masks, recorded, replayed
from ..errors import GraphpruneError
from ..operations.labels import Array
from ..select import Kept
from ..tracing.graph import Graph
from ..tracing.node import Node
from ..tracing.rehearsal import Difference, rehearse
from ..tracing.shadow import evaluating, modal, shadow
from ..tracing.sizes import leaves
from ..tracing.symbols import Wrong, solve
from ..tracing.trees import leaf_tensors, modules_of, tensors

LIMITS = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative, of one result; 5e-2 for shorter numbers


COMMON = frozenset((0.0, 1.0, -1.0, 0.5, 2.0))


def numbers_of_unknown_origin(graph: Graph, model: nn.Module) -> bool:
    """Whether the code computes with a fraction that is no attribute of a module: it may be made of a size (``0.1 / width``), of which Python says nothing."""
    fractions = [number for node in graph.nodes if any(value.fields for value in node.held) for number in _fractions(node)]
    if not fractions:
        return False
    attributes = {number for _, module in modules_of(model) for item in module.__dict__.values() for number in _floats(item)}
    return not attributes.union(COMMON).issuperset(fractions)


def _floats(item: Any) -> Iterator[float]:
    if type(item) is float:
        yield item
    elif type(item) in (list, tuple):
        yield from (each for each in item if type(each) is float)


def _fractions(node: Node) -> Iterator[float]:
    return (item for item in (*node.args, *node.kwargs.values()) if type(item) is float)


@dataclass(frozen=True)
class Fault:
    """Labels to leave whole, and why."""

    labels: Array
    text: str


@dataclass(frozen=True)
class Proof:
    """Runs cut models beside the recorded calls of ``graph``; ``always``: where every size is solved for as well (code may read one unseen)."""

    graph: Graph
    model: nn.Module
    values: bool = False
    always: bool = False

    @property
    def possible(self) -> bool:
        """Without values a model can only be run if its control flow asks for none."""
        return self.values or not self.graph.real

    @cached_property
    def hollow(self) -> nn.Module:
        return shadow(self.model, real=False)[0]

    def difference(self, groups: Groups, kept: Kept, edits: dict[tuple[Any, ...], int]) -> Difference | None:
        """Where the model cut like this parts from what was promised."""
        plan = make_plan(groups, kept, edits, ())
        difference = None if self.graph.real else rehearse(self.graph, apply(self.hollow, plan), Survivors(groups, kept).axis)
        if difference or not self.values:
            return difference
        replays = not any(modal(module) for _, module in modules_of(self.model))  # else the weights are others in evaluation mode
        return (self._beside(plan) if replays else None) or self._elsewhere(plan)

    def _beside(self, plan: Plan) -> Difference | None:
        small = evaluating(apply(self.model, plan))
        inputs = list(tensors(self.graph.example, torch.Tensor))
        graph = recorded(self.graph, self.model, plan)
        dice: list[list[torch.Tensor]] = []
        masks, calls = Masks(graph, plan), replayed(graph, self.model, plan, inputs, dice)

        def watch(node: Any, results: list[torch.Tensor]) -> str:
            with _disable_current_modes(), torch.no_grad():
                if node.op.draws:
                    dice.append([result.clone() for result in results])
                wanted = next(calls)
                if node.op.unset:
                    return ""
                return next((text for text in map(_apart, results, wanted, [masks.kept(v) for v in node.outs]) if text), "")

        return rehearse(graph, small, masks.axis, real=True, watch=watch)

    def _elsewhere(self, plan: Plan) -> Difference | None:
        """What only the check sees: a further example, training mode, an example drawn anew."""
        text = self._unequal(plan)
        return Difference(self.graph.counted, text, values=True) if text else None

    def judge(self, groups: Groups, kept: Kept, edits: dict[tuple[Any, ...], int], wrong: list[Wrong], draft: bool = False) -> tuple[list[Wrong], list[Fault]]:
        """What of ``wrong`` is wrong indeed: what is certain, or what the first difference comes from; else other axes that are to blame for it.

        A ``draft`` of the widths is run only where a size is in doubt.
        """
        certain = [each for each in wrong if each.certain or self._untried(each)]
        if certain or not self.possible:
            return certain or wrong, []
        if not wrong and (draft or not self.always):
            return [], []
        difference = self.difference(groups, kept, edits)
        if difference is None:
            return [], []
        if difference.values:
            return [], self._searched(groups, kept, difference)
        # A branch on a size falls otherwise, or torch takes other calls for some lengths (1), and the code comes to the same end.
        if not difference.number and all(each.need is None and each.call is None for each in wrong) and self._agrees(make_plan(groups, kept, edits, ())):
            return [], []
        blamed = self._blamed(groups, wrong, difference)
        if blamed:
            return blamed, []
        faults = self._searched(groups, kept, difference)
        return (wrong, []) if not faults else ([], faults)

    def _untried(self, wrong: Wrong) -> bool:
        """Whether a size was given to a call of a run that is not made again (it stopped), and which no other run made."""
        at = wrong.at if wrong.call is None else wrong.call.since
        if at < len(self.graph.nodes) or any(rerun.covers(at) for rerun in self.graph.reruns):
            return False
        if wrong.call is None:
            return all(wrong.where != doubt.where for doubt in (*self.graph.doubts, *self.graph.outcomes) if doubt.at < len(self.graph.nodes))
        said = wrong.call.op, wrong.call.module, wrong.call.line
        return all(said != (call.op, call.module, call.line) for call in self.graph.calls if call.since < len(self.graph.nodes))

    def _blamed(self, groups: Groups, wrong: list[Wrong], difference: Difference) -> list[Wrong]:
        """The sizes that are given to the call at which the two part, or else the last doubt before it about an axis of its tensors."""
        covering = [each for each in wrong if each.call and each.call.since <= difference.index < each.call.until]
        if covering:
            return covering
        touched = self._touched(groups, difference)
        doubts = [each for each in wrong if 0 <= each.at <= difference.index and touched & set(self._along(groups, each))]
        last = max(doubts, key=lambda each: each.at, default=None)
        return [each for each in doubts if last is not None and each.where == last.where]

    def _agrees(self, plan: Plan) -> bool:
        """Whether the cut model, run with values, computes what the zeroed original computes."""
        return not any(tensor.is_meta for *_, tensor in leaf_tensors(self.model)) and not self._unequal(plan)

    def _unequal(self, plan: Plan) -> str:
        """How the cut model differs from the zeroed original, in words."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(self.graph, self.model, apply(self.model, plan), plan)
        except GraphpruneError as error:
            return str(error)
        return ""

    def _along(self, groups: Groups, wrong: Wrong) -> Iterator[int]:
        for leaf in leaves(wrong.expr):
            if leaf[0] == "dim":
                yield from groups.along(leaf[1], leaf[2])
            else:
                for call in self.graph.calls:
                    if any(other == leaf for other in leaves(call.expr) if other[0] == "attr"):
                        yield from groups.along(call.need.value, call.need.dim)

    def _touched(self, groups: Groups, difference: Difference) -> set[int]:
        """The groups along the tensors of the call at which the two part."""
        runs = [(0, self.graph.nodes), *((rerun.start, rerun.nodes) for rerun in self.graph.reruns)]
        node = next((nodes[difference.index - start] for start, nodes in runs if 0 <= difference.index - start < len(nodes)), None)
        if node is None or difference.values:
            return set()
        return {index for value in (*node.held, *node.outs) for dim in range(len(value.shape)) for index in groups.along(value, dim)}

    def _searched(self, groups: Groups, kept: Kept, difference: Difference) -> list[Fault]:
        """The one group without whose cut the difference is not there (nor any before it), those along the call first; by halves."""
        short = [index for index, (group, stay) in enumerate(zip(groups, kept, strict=True)) if len(stay) < group.size]
        touched = self._touched(groups, difference)
        order = sorted(short, key=lambda index: index not in touched)
        low, high = 0, 1
        while not self._gone(groups, kept, order[:high], difference):
            if high >= len(order):
                return []
            low, high = high, min(2 * high, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._gone(groups, kept, order[:middle], difference) else (middle, high)
        return [Fault(groups.groups[order[high - 1]].units, _sentence(difference))]

    def _gone(self, groups: Groups, kept: Kept, whole: list[int], difference: Difference) -> bool:
        trial = list(kept)
        for index in whole:
            trial[index] = torch.arange(groups.groups[index].size)
        edits, _ = solve(self.graph, Survivors(groups, trial).length)
        now = self.difference(groups, trial, edits)
        return difference.before(now)


def _sentence(difference: Difference) -> str:
    verb = "computes" if difference.values else "does"
    return f"with a shorter one the code {verb} something else: {difference.text}" + (f" ({difference.place})" if difference.place else "")


def _apart(result: torch.Tensor, wanted: torch.Tensor, kept: dict[int, torch.Tensor]) -> str:
    """How a result differs from the surviving entries of the zeroed original's."""
    for dim, positions in kept.items():
        wanted = wanted.index_select(dim, positions.to(wanted.device))
    if not result.numel() or result.is_meta:
        return ""
    if not result.is_floating_point() and not result.is_complex():
        return "" if torch.equal(result, wanted.to(result.device)) else "other whole numbers"
    finite = torch.isfinite(wanted)
    if not torch.equal(torch.isfinite(result), finite):
        return "not finite in the same places"
    wanted, result = wanted[finite], result[finite]
    gap = float((result - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0) if len(wanted) else 0.0
    return "" if gap <= LIMITS.get(result.dtype, 5e-2) else f"a result differs by {gap:.1e} (relative)"
