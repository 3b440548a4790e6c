"""graphprune: structured pruning for PyTorch. ``small = graphprune.shrink(model, example_input, ratio=0.5)``."""

from . import scores
from .apply import apply
from .catalogue import available, register
from .errors import GraphpruneError
from .groups import Group, Groups, couple
from .laws import check_rule
from .masks import bake, masked, semi_structured
from .plan import Plan
from .rules import rule
from .scores import Score, score
from .select import select
from .shrink import shrink
from .sparse import SparseTraining
from .store import expand, load, save
from .trace import Graph, trace
from .zeroed import zeroed

__all__ = [
    "Graph",
    "GraphpruneError",
    "Group",
    "Groups",
    "Plan",
    "Score",
    "SparseTraining",
    "apply",
    "available",
    "bake",
    "check_rule",
    "couple",
    "expand",
    "load",
    "masked",
    "register",
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
