"""graphprune: structured pruning for PyTorch. ``small = graphprune.shrink(model, example_input, ratio=0.5)``."""

from . import scores
from .catalogue import available, register
from .cost import Cost, cost, profile
from .coupling.groups import Group, Groups, couple
from .cutting.apply import apply
from .cutting.compose import compose
from .cutting.expand import expand
from .cutting.masks import bake, masked, semi_structured
from .cutting.plan import Plan, plan_of
from .cutting.zeroed import zeroed
from .errors import GraphpruneError
from .formats.folder import load, save
from .loop.distill import Distillation
from .loop.history import History
from .loop.iterate import Result, iterate
from .loop.optimizer import refresh_ema, refresh_optimizer
from .loop.sparse import SparseTraining
from .operations.laws import check_rule
from .operations.notation import expr
from .operations.record import rule
from .options import Repair, Runtime, Widths
from .repair import repair
from .scores import Score, score
from .select import select
from .shrink import plan, shrink
from .timing.fuse import fuse
from .timing.measure import Measurement, measure
from .tracing.trace import Graph, trace
from .version import VERSION as __version__

__all__ = [
    "Distillation",
    "Cost",
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
    "SparseTraining",
    "Widths",
    "apply",
    "available",
    "bake",
    "check_rule",
    "compose",
    "cost",
    "couple",
    "expand",
    "expr",
    "fuse",
    "iterate",
    "load",
    "masked",
    "refresh_ema",
    "refresh_optimizer",
    "measure",
    "plan",
    "plan_of",
    "profile",
    "register",
    "repair",
    "rule",
    "save",
    "score",
    "scores",
    "select",
    "semi_structured",
    "shrink",
    "trace",
    "zeroed",
    "__version__",
]
