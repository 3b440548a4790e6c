"""graphprune: structured pruning for PyTorch. ``small = graphprune.shrink(model, example_input, ratio=0.5)``."""

from . import scores
from .apply import apply
from .catalogue import available, register
from .compose import compose
from .cost import Cost, cost, profile
from .distill import Distillation
from .errors import GraphpruneError
from .fuse import fuse
from .groups import Group, Groups, couple
from .history import History
from .iterate import Result, iterate
from .laws import check_rule
from .masks import bake, masked, semi_structured
from .measure import Measurement, measure
from .optimizer import refresh_ema, refresh_optimizer
from .plan import Plan
from .repair import repair
from .rules import rule
from .scores import Score, score
from .select import select
from .shrink import shrink
from .sparse import SparseTraining
from .store import expand, load, save
from .trace import Graph, trace
from .zeroed import zeroed

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
    "Result",
    "Score",
    "SparseTraining",
    "apply",
    "available",
    "bake",
    "check_rule",
    "compose",
    "cost",
    "couple",
    "expand",
    "fuse",
    "iterate",
    "load",
    "masked",
    "refresh_ema",
    "refresh_optimizer",
    "measure",
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
]
