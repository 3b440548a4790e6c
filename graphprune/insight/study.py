"""Many plans of one model from one trace and one score: :class:`Study`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..coupling.groups import Groups, couple
from ..cutting.apply import apply
from ..cutting.plan import Plan
from ..cutting.verify import check_model
from ..errors import BadScore, GraphpruneError
from ..planning.planner import with_steps
from ..planning.request import ask
from ..planning.trial import best
from ..scores import Scores
from ..scores.attempts import Attempts, attempts, remembered
from ..tracing.trace import trace

Evaluate = Callable[[nn.Module], Any]


class Study:
    """A model that is traced once and scored once, and cut in many ways; it is left as it is.

    ``rules`` are those of :func:`graphprune.shrink` that hold for every cut: ``scope``, ``keep``, ``widths``.
    """

    def __init__(self, model: nn.Module, example_input: Any, score: Any = "l2", example_kwargs: dict[str, Any] | None = None, **rules: Any) -> None:
        check_model(model)
        self.model, self.score, self.rules = model, score, rules
        first = ask(model, 0.5, score=score, **rules).stages[0]
        self.graph = trace(model, example_input, example_kwargs)
        self.groups: Groups = couple(self.graph, tuple((name, None) for name in first.keep if name in self.graph.leaves))
        self.scored: Attempts = remembered(attempts(model, first.score, first.batches, first.loss))

    def plan(self, ratio: Any = None, targets: Mapping[str, Any] | None = None, ratios: Any = None) -> Plan:
        """The plan for a ratio or for targets (no times); ``ratios`` is a function of the groups that gives some a ratio of their own."""
        request = ask(self.model, ratio, targets, score=self.score, **self.rules).stages[0]
        if ratios is not None:
            request = replace(request, widths=replace(request.widths, ratios=ratios))
        return best(self.graph, self.model, with_steps(self.graph, self.model, request), self.scored)

    def scores(self) -> Scores:
        """The scores of the groups as they are, whatever the code may allow of them."""
        *_, (_, scores) = self.scored(self.groups)
        return scores

    def cut(self, plan: Plan) -> nn.Module:
        return apply(self.model, plan)

    def value(self, evaluate: Evaluate, model: nn.Module, what: str) -> float:
        """What ``evaluate`` returns, as a number; raises :class:`~graphprune.errors.BadScore` where it is none."""
        try:
            value = evaluate(model)
            number = float(value.item() if isinstance(value, torch.Tensor) else value)
        except GraphpruneError:
            raise
        except Exception as error:
            raise BadScore(f"evaluate failed on {what}: {type(error).__name__}: {error}; it takes a model and returns one number, larger is better") from error
        if not math.isfinite(number):
            raise BadScore(f"evaluate returned {number} for {what}; it returns one finite number, larger is better")
        return number
