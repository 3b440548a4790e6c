"""What every rank of a distributed run does alike (:mod:`graphprune.distributed`): :func:`across_ranks` and :func:`agreed`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from .cutting.plan import Plan
from .distributed import alike, first, joined, shared, spread, together, whole
from .errors import BadModel
from .options import Repair
from .scores import OnData

F = TypeVar("F", bound=Callable[..., Any])


def across_ranks(function: F) -> F:
    """A function of :func:`graphprune.shrink`'s options for ranks that each have a share of the data, or of the model.

    With data (or a model that is spread over ranks) all ranks call it together, and each gets the result of the data of all.
    """

    @functools.wraps(function)
    def call(model: Any, *args: Any, **options: Any) -> Any:
        score, repair = options.get("score"), Repair.of(options.get("repair"))
        read = [each for each in (score.values() if isinstance(score, Mapping) else [score]) if isinstance(each, OnData)]
        parts = isinstance(model, nn.Module) and spread(model)
        if parts and options.get("inplace"):
            raise BadModel("the model is spread over ranks (DTensor) and cannot be cut in place: take what shrink returns, and spread that (fully_shard)")
        with together(bool(read) or repair is not None or parts):
            model = whole(model) if parts else model
            if not joined():
                return function(model, *args, **options)
            alike(model)
            if read:
                options["score"] = {kind: _of_all(each) for kind, each in score.items()} if isinstance(score, Mapping) else _of_all(score)
            if repair is not None and repair.batches is not None:
                options["repair"] = replace(repair, batches=shared(repair.batches))
            return function(model, *args, **options)

    return call  # type: ignore[return-value]


def agreed(plan: Plan) -> Plan:
    """The plan of the first rank, which all carry out: where numbers are computed differently, ranks could decide differently."""
    if not joined():
        return plan
    mine = plan.to_json()
    text = first(mine)
    return plan if text == mine else Plan.from_json(text)


def _of_all(score: Any) -> Any:
    return replace(score, batches=shared(score.batches)) if isinstance(score, OnData) else score
