"""What of a plan the configuration of a model does not say: :func:`misfit`."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..cutting.apply import apply
from ..cutting.plan import Plan
from ..tracing.graph import Graph
from .agreement import difference, is_another, numbers_of, promised_numbers, without_values
from .closing import Lists, closed
from .config import Slot, Solution, changed, search
from .huggingface import read_as_sizes
from .rebuilt import builder, loaded, tree_of


class Misfit(NamedTuple):
    """Axes of a cut model that its configuration does not say, and why; ``reason`` is empty where it says all of them."""

    wrong: frozenset[Slot]
    reason: str
    solution: Solution
    lists: Lists


def misfit(graph: Graph, model: nn.Module, plan: Plan) -> Misfit:
    """What of a plan the configuration does not say."""
    small = apply(model, plan.stages[0])
    whole, lists = closed(small)
    solution = search(builder(whole), whole, tree_of(whole), lists, used=read_as_sizes(graph, lists))
    if not solution.gap.loads:
        return Misfit(frozenset(solution.gap.axes), "no number of the configuration says this width alone", solution, lists)
    if not difference(whole, small, solution, graph):
        return Misfit(frozenset(), "", solution, lists)
    return Misfit(_factors(whole, solution), "what the configuration says of this width is also a factor", solution, lists)


def _factors(whole: nn.Module, solution: Solution) -> frozenset[Slot]:
    """The axes whose numbers in the configuration are also factors, where the model that is built computes something else."""
    wanted, built = (
        (promised_numbers(whole), promised_numbers(whole, solution.tree))
        if without_values(whole)
        else (numbers_of(whole), numbers_of(loaded(whole, solution.tree)))
    )
    off = {place for place, value in wanted.items() if is_another(built.get(place, value), value)}
    culprits: set[Slot] = set()
    reach = solution.reach()
    for path in solution.changes:
        rest = tuple(item for item in solution.changes.items() if item[0] != path)
        if solution.mends(rest):  # a number that the code reads is right without this change
            culprits |= reach[path]
        try:
            values = numbers_of(builder(whole, bare=True)(changed(tree_of(whole), rest)))
        except Exception:  # numbers that do not go together: this one cannot be asked about alone
            continue
        if any(values.get(place) != built[place] for place in off):
            culprits |= reach[path]
    return frozenset(culprits or set().union(*reach.values()))
