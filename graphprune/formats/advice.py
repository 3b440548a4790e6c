"""What to ask for instead of widths that no configuration says: :func:`advice`, in a sentence."""

from __future__ import annotations

from ..coupling.groups import couple
from ..planning.units import CHANNELS, roles
from ..tracing.graph import Graph
from .closing import Lists, before_closing
from .config import Solution


def advice(solution: Solution, graph: Graph, lists: Lists, asked: tuple[str, ...] = ()) -> str:
    """Which kinds the numbers of the configuration that say the wrong widths also say, so that they go together; "" where none do.

    ``asked`` are the kinds that were asked for; without them, those of the wrong widths.
    """
    slots = {(before_closing(name, lists), axis) for name, axis in solution.partners()}
    if not slots:
        return ""
    groups = couple(graph)
    kinds = roles(groups)
    wrong = {(before_closing(name, lists), axis) for name, axis in solution.gap.axes}
    asked = asked or tuple(sorted({kinds[group.index] for group in groups if not wrong.isdisjoint(group.places)}))
    more = sorted({kinds[group.index] for group in groups if not slots.isdisjoint(group.places)} - set(asked))
    if not more or not asked or not {*asked, *more} <= {*kinds.values()} - {CHANNELS}:  # what lies inside of heads is planned by itself
        return ""
    together = ", ".join(f'"{name}"' for name in (*asked, *more))
    return (
        f"The configuration says {' and '.join(asked)} together with {' and '.join(more)}: "
        f"what=({together}) and widths=graphprune.Widths(uniform=True) take the same share of both. "
    )
