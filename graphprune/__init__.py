"""graphprune: structured pruning for PyTorch. ``small = graphprune.shrink(model, example_input, ratio=0.5)``."""

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
from .options import Repair, Runtime, Widths
from .planning.overview import widths
from .repair import repair
from .scores import Score, score
from .select import select
from .shrink import plan, shrink
from .tables import Table
from .timing.fuse import fuse
from .timing.measure import Measurement, measure
from .tracing.trace import Graph, trace
from .version import VERSION as __version__

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
    "trace",
    "tradeoff",
    "widths",
    "zeroed",
]
