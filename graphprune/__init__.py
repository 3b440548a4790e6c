"""graphprune: structured pruning for PyTorch. ``small = graphprune.shrink(model, example_input, ratio=0.5)``."""

from .apply import apply
from .cost import Cost, cost, profile
from .errors import GraphpruneError
from .groups import Group, Groups, couple
from .laws import check_rule
from .measure import Measurement, measure
from .plan import Plan
from .rules import rule
from .score import score
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
    "apply",
    "check_rule",
    "cost",
    "couple",
    "expand",
    "load",
    "measure",
    "profile",
    "rule",
    "save",
    "score",
    "select",
    "shrink",
    "trace",
    "zeroed",
]
