"""The closed forms of a repair, in their order: what needs no data, then the fits of weights, then batch-norm statistics (:class:`Closed`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..cutting.plan import Plan
from ..tracing.graph import Graph
from ..tracing.probe import batch_inputs
from ..tracing.trace import trace
from ..tracing.trees import leaf_tensors, tensors
from .calibration import example
from .fitting import Repaired, Setting
from .free import STEPS as FREE
from .free import repair_free
from .sequential import repair_weights
from .statistics import reestimate

WEIGHTS = ("bias", "variance", "least-squares", "censored")
STEPS = (*FREE, *WEIGHTS, "bn")


@dataclass(frozen=True)
class Closed:
    """Repairs ``small``, which ``plan`` cut from ``original`` (with the trace ``graph``), in place by the closed forms among ``names``."""

    original: nn.Module
    small: nn.Module
    graph: Graph
    plan: Plan
    names: tuple[str, ...]
    fits: list[Any]
    checks: list[Any]
    target: str
    rows: int
    room: float
    progress: bool
    scarce: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(self, again: bool) -> list[Repaired]:
        """``again``: at last on all inputs, so that those kept out of the fits have been seen by the model too."""
        free = tuple(name for name in self.names if name in FREE)
        weights = sorted((name for name in self.names if name in WEIGHTS), key="censored".__eq__)  # which others would undo
        done = repair_free(self.original, self.small, self.graph, self.plan, free, self.checks or self.fits) if free else []
        if weights:
            setting = Setting(tuple(weights), self.target, self.rows, self.room, again, self.scarce)
            done += repair_weights(self.original, self.small, self.graph, self.plan, self.fits, self.checks, setting, self.progress)
        return done + (self._statistics(again) if "bn" in self.names else [])

    def _statistics(self, again: bool) -> list[Repaired]:
        graph = trace(self.small, *example(self.fits[0])) if self.plan.parts else self.graph  # with other parts a model makes other calls
        before = distance(self.original, self.small, self.checks or self.fits)
        old = {name: tensor.clone() for name, _, _, tensor in leaf_tensors(self.small)}
        if not reestimate(self.small, graph, [*self.fits, *self.checks] if again else self.fits, self.room):
            return []
        after = distance(self.original, self.small, self.checks or self.fits)
        better = after <= before
        if not better:
            for name, _, _, tensor in leaf_tensors(self.small):
                tensor.copy_(old[name])
        return [Repaired("bn", "outputs of the model", before, after, better)]


def distance(original: nn.Module, small: nn.Module, batches: Sequence[Any]) -> float:
    """Mean squared difference of the floating outputs over their own variance."""
    gap = spread = 0.0
    for batch in batches:
        args, kwargs = batch_inputs(batch)
        wanted, outputs = (list(tensors(m(*args, **kwargs), torch.Tensor)) for m in (original, small))
        for one, two in zip(wanted, outputs, strict=True):
            if one.is_floating_point():
                gap += float((one.double() - two.double()).square().sum())
                spread += float((one.double() - one.double().mean()).square().sum())
    return gap / max(spread, torch.finfo(torch.float64).tiny)
