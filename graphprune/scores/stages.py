"""Statistics of one stage of a model at a time: all batches go through it, rest where little has to be kept of them, and go on.

Sums of products of all layers at once would take memory in proportion to their number; stage by stage they take that of the largest layer, and the
activations of all batches at one point between two stages. Every batch still runs once. Where stages begin and end follows from the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import GraphpruneError, NeedsBatches
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.paced import Paced, side_by_side
from .data import samples
from .seen import Place, finite, observe
from .task import Task

Tensor = torch.Tensor
See = Callable[[Place, Tensor, int], None]


@dataclass(frozen=True)
class Stage:
    """The groups that are complete when every run rests at ``rest`` (None: at its end)."""

    groups: tuple[int, ...]
    rest: Value | None


def stages(graph: Graph, every: Sequence[Sequence[Place]], bytes: Sequence[int]) -> list[Stage]:
    """Groups by where they have been seen completely, as many in a stage as are no larger together than the largest alone.

    ``bytes`` are those of the statistics of each group.
    """
    shown, alive = _shown(graph)
    spans = {index: sorted(shown[id(place.value)][0] for place in mine) for index, mine in enumerate(every) if mine}
    order = sorted(spans, key=lambda index: spans[index][-1])
    parts: list[list[int]] = []
    for index in order:
        if parts and sum(bytes[each] for each in (*parts[-1], index)) <= max(bytes):
            parts[-1].append(index)
        else:
            parts.append([index])
    points = list(shown.values())
    found = []
    for mine, later in zip(parts, [*parts[1:], []], strict=True):
        last = spans[mine[-1]][-1]
        begun = [spans[index][0] for index in later if spans[index][0] > last]
        first = min(begun) if begun else min((spans[index][-1] for index in later), default=last)
        window = [(alive[at], -at, value) for at, value in points if last <= at <= first] if later else []
        found.append(Stage(tuple(mine), min(window, key=lambda item: item[:2])[2] if window else None))
    return [Stage((), None)] if not found else found


def passed(task: Task, every: Sequence[list[Place]], see: Callable[[Place, Tensor], None]) -> None:
    """As :func:`~graphprune.scores.seen.observe`; where the weights are in files, stage by stage, so that each is read once for all batches."""
    if task.stored is None:
        observe(task, list(every), see)
        return
    for _ in by_stage(task, every, [1] * len(every), lambda place, tensor, _: see(place, tensor)):
        pass


def by_stage(task: Task, every: Sequence[Sequence[Place]], bytes: Sequence[int], see: See) -> Iterator[tuple[int, ...]]:
    """Run all batches side by side; the numbers of the groups of each stage in turn, once ``see(place, tensor, samples)`` has seen all of it."""
    graph = task.groups.graph
    plan = stages(graph, every, bytes)
    at: dict[int, list[Place]] = {}
    values: dict[int, Value] = {}
    for place in (place for mine in every for place in mine):
        at.setdefault(id(place.value), []).append(place)
        values[id(place.value)] = place.value
    values |= {id(stage.rest): stage.rest for stage in plan if stage.rest is not None}
    rests = frozenset(id(stage.rest) for stage in plan if stage.rest is not None)

    def take(value: Value, count: int) -> Callable[[Tensor], None]:
        def show(tensor: Tensor) -> None:
            for place in at.get(id(value), ()):
                see(place, finite(task, place, tensor.detach()), count)

        return show

    runs = [Paced(task.model, graph, batch, {key: (value, take(value, samples(batch))) for key, value in values.items()}, rests) for batch in task.data]
    with side_by_side(runs):
        for stage in plan:
            for run in runs:
                _go_on(task, run, stage.rest)
            yield stage.groups


def _go_on(task: Task, run: Paced, rest: Value | None) -> None:
    """Let a run go on to its next rest, or to its end."""
    try:
        run.finish() if rest is None else run.until(rest)
    except GraphpruneError:
        raise
    except Exception as error:
        raise NeedsBatches(f"a batch of the score {task.name!r} does not fit the model: {type(error).__name__}: {str(error)[:500]}") from error


def _shown(graph: Graph) -> tuple[dict[int, tuple[int, Value]], list[int]]:
    """The call at which each value is shown first, and how many entries are alive after each call."""
    steps = [step for step in graph.steps if step.floats]
    shown: dict[int, tuple[int, Value]] = {}
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        for value in (*step.args, *step.results):
            if value is not None and not value.leaf:
                shown.setdefault(id(value), (number, value))
                last[id(value)] = number
    change = [0] * (len(steps) + 1)
    for key, (number, value) in shown.items():
        change[number] += math.prod(value.shape)
        change[last[key] + 1 if last[key] + 1 < len(change) else -1] -= math.prod(value.shape)
    alive, total = [], 0
    for step in change[:-1]:
        total += step
        alive.append(total)
    return shown, alive
