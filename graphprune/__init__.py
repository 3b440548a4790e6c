"""graphprune: structured pruning for PyTorch. ``small = graphprune.shrink(model, example_input, ratio=0.5)``.

Nothing is loaded before it is asked for: ``import graphprune`` costs no more than the names below.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from . import checkpoint, scores
    from .catalogue import available, register
    from .cost import Cost, cost, profile
    from .coupling.groups import Group, Groups, couple
    from .cutting.compose import compose
    from .cutting.expand import expand
    from .cutting.masks import bake, masked, semi_structured
    from .cutting.plan import Plan, plan_of
    from .cutting.zeroed import zeroed
    from .errors import GraphpruneError
    from .formats.applied import apply
    from .formats.folder import load, save
    from .formats.tokens import tokens
    from .insight.picture import picture
    from .insight.report import report
    from .insight.sensitivity import Sensitivity, sensitivity
    from .insight.tradeoff import Tradeoff, tradeoff
    from .loop.distill import Distillation
    from .loop.history import History
    from .loop.iterate import Result, iterate
    from .loop.optimizer import refresh_ema, refresh_optimizer
    from .loop.sparse import SparseTraining
    from .operations.laws import check_rule
    from .operations.notation import expr
    from .operations.record import rule
    from .options import Repair, Runtime, Vocabulary, Widths
    from .planning.overview import widths
    from .planning.selected import plan_from
    from .repair import repair
    from .scores import Score, score
    from .select import select
    from .shrink import plan, shrink
    from .tables import Table
    from .timing.fuse import fuse
    from .timing.measure import Measurement, measure
    from .tracing.graph import Graph
    from .tracing.trace import trace

__all__ = [
    "Cost",
    "Distillation",
    "Graph",
    "GraphpruneError",
    "Group",
    "Groups",
    "History",
    "Measurement",
    "Plan",
    "Repair",
    "Result",
    "Runtime",
    "Score",
    "Sensitivity",
    "SparseTraining",
    "Table",
    "Tradeoff",
    "Vocabulary",
    "Widths",
    "__version__",
    "apply",
    "available",
    "bake",
    "check_rule",
    "checkpoint",
    "compose",
    "cost",
    "couple",
    "expand",
    "expr",
    "fuse",
    "iterate",
    "load",
    "masked",
    "measure",
    "picture",
    "plan",
    "plan_from",
    "plan_of",
    "profile",
    "refresh_ema",
    "refresh_optimizer",
    "register",
    "repair",
    "report",
    "rule",
    "save",
    "score",
    "scores",
    "select",
    "semi_structured",
    "sensitivity",
    "shrink",
    "tokens",
    "trace",
    "tradeoff",
    "widths",
    "zeroed",
]

# Where each name is defined.
PLACES = {
    ".catalogue": "available register",
    ".cost": "Cost cost profile",
    ".coupling.groups": "Group Groups couple",
    ".cutting.compose": "compose",
    ".cutting.expand": "expand",
    ".cutting.masks": "bake masked semi_structured",
    ".cutting.plan": "Plan plan_of",
    ".cutting.zeroed": "zeroed",
    ".errors": "GraphpruneError",
    ".formats.applied": "apply",
    ".formats.folder": "load save",
    ".formats.tokens": "tokens",
    ".insight.picture": "picture",
    ".insight.report": "report",
    ".insight.sensitivity": "Sensitivity sensitivity",
    ".insight.tradeoff": "Tradeoff tradeoff",
    ".loop.distill": "Distillation",
    ".loop.history": "History",
    ".loop.iterate": "Result iterate",
    ".loop.optimizer": "refresh_ema refresh_optimizer",
    ".loop.sparse": "SparseTraining",
    ".operations.laws": "check_rule",
    ".operations.notation": "expr",
    ".operations.record": "rule",
    ".options": "Repair Runtime Vocabulary Widths",
    ".planning.overview": "widths",
    ".planning.selected": "plan_from",
    ".repair": "repair",
    ".scores": "Score score",
    ".select": "select",
    ".shrink": "plan shrink",
    ".tables": "Table",
    ".timing.fuse": "fuse",
    ".timing.measure": "Measurement measure",
    ".tracing.graph": "Graph",
    ".tracing.trace": "trace",
}
_HOMES = {name: place for place, names in PLACES.items() for name in names.split()}


class _Package(ModuleType):
    """Where a function and the file it is in have the same name, the name means the function, whichever is loaded first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
        return value
    if name[:1] != "_" and find_spec(f".{name}", __name__):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
