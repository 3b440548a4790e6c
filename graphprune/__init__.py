"""graphprune: structured pruning for PyTorch. ``small = graphprune.shrink(model, example_input, ratio=0.5)``."""

from . import scores
from .apply import apply
from .catalogue import available, register
from .cost import Cost, cost, profile
from .errors import GraphpruneError
from .groups import Group, Groups, couple
from .laws import check_rule
from .measure import Measurement, measure
from .plan import Plan
from .rules import rule
from .scores import Score, score
from .select import select
from .shrink import shrink
from .store import expand, load, save
from .trace import Graph, trace
from .zeroed import zeroed

__all__ = [
    "Cost",
    "Graph",
    "GraphpruneError",
    "Group",
    "Groups",
    "Measurement",
    "Plan",
    "Score",
    "apply",
    "available",
    "check_rule",
    "cost",
    "couple",
    "expand",
    "load",
    "measure",
    "profile",
    "register",
    "rule",
    "save",
    "score",
    "scores",
    "select",
    "shrink",
    "trace",
    "zeroed",
]
