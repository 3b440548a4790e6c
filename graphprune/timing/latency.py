"""A time that is asked for, and met: :func:`reach` predicts, cuts, measures end to end, corrects, and tries again.

Predictions are sums over the operations (:mod:`graphprune.timing.table`); what they miss (memory traffic between operations,
fusion, the runtime's own overhead) is learnt from the measurements: the search is a bracketed secant method on the
logarithms of predicted and measured time, both as shares of the original's. Each measurement is interleaved with the
original, so that what disturbs the machine disturbs both, and ends as soon as it is clear whether the time is met. What was
measured is kept on disk next to the table (:mod:`graphprune.timing.learnt`): the next search starts there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..budget.targets import Aims, stays
from ..cost import Costs, priced
from ..coupling.groups import Groups
from ..coupling.lengths import Lengths
from ..cutting.apply import apply
from ..cutting.plan import Plan
from ..errors import BadMeasure, BadTarget, GraphpruneError
from ..operations.labels import Array
from ..tracing.graph import Graph
from .align import alignments
from .learnt import TOLERANCE, Learnt, Point, guess
from .measure import clock_for, interleave, middle_of, using_threads
from .runtimes import evaluating, prepare
from .table import Times, described, device_name, shared, times

SECONDS = 2.0
ATTEMPTS = 8
NOISE, UNSURE = 0.1, 0.02  # bands that are refused, and bands for which it is worth to measure for longer
CERTAIN = TOLERANCE + 0.01  # a band within this of the target is narrow enough: neighbouring processes differ by more
Propose = Callable[[dict], tuple[Groups, list, Plan]]


@dataclass(frozen=True)
class Timing:
    """One end-to-end comparison: seconds of the new model, its share of the original's time with a band, the control."""

    seconds: float
    share: float
    band: tuple[float, float]
    control: float

    @property
    def noise(self) -> float:
        return (self.band[1] - self.band[0]) / 2 / self.share

    def moved(self, share: float) -> Timing:
        """The same around another share, with the band as wide (relatively) as it is."""
        return dataclasses.replace(self, share=share, band=(self.band[0] * share / self.share, self.band[1] * share / self.share))


class Stopwatch:
    """Times models against the original on the runtime that was asked for."""

    def __init__(self, model: nn.Module, graph: Graph, aims: Aims, seconds: float = SECONDS) -> None:
        self.model, self.aims, self.seconds = model, aims, seconds
        self.args, self.kwargs = graph.example
        self.table = shared(graph, aims.runtime, aims.threads)
        self.device, self.threads = self.table.device, self.table.threads
        self.call: Any = None

    def __call__(self, small: nn.Module, target: float | None = None, pooled: Callable[[float], float] = float) -> Timing:
        """Ends early when it is clear whether ``target`` (a share of the original's time) is met.

        ``pooled`` makes of a measured share the one that decides this (with earlier measurements of the same widths); what is returned
        is what was measured now. Raises :class:`~graphprune.errors.BadMeasure` when the times make no sense or scatter too much.
        """

        def enough(rows: np.ndarray) -> bool:
            timing = _timing(rows)
            return _clear(timing.moved(pooled(timing.share)), target)

        with using_threads(self.threads), evaluating(self.model), evaluating(small):
            rows = self._own(small, enough) if self.aims.measure else self._runtime(small, enough)
        timing = _timing(rows)
        if timing.noise > NOISE:
            low, high = timing.band
            raise BadMeasure(
                f"the measured time scatters too much: {timing.share:.3f} of the original's, between {low:.3f} and {high:.3f} "
                f"({len(rows)} rounds; a band of {100 * timing.noise:.0f} %, where {100 * NOISE:.0f} % are allowed); "
                "run on a quiet machine, on one thread (threads=1), or time more work per call (a larger batch)"
            )
        return timing

    def alone(self) -> float:
        """Seconds of the original."""
        with using_threads(self.threads), evaluating(self.model):
            if self.aims.measure:
                return statistics.median(_seconds(self.aims.measure, self.model) for _ in range(3))
            self.call = self.call or prepare(self.model, self.args, self.kwargs, self.aims.runtime, self.threads)
            return float(np.median(interleave([self.call], clock_for(self.device, self.threads)[1], self.seconds / 4, 0.01)))

    def _runtime(self, small: nn.Module, enough: Callable[..., Any]) -> Any:
        self.call = self.call or prepare(self.model, self.args, self.kwargs, self.aims.runtime, self.threads)
        call = prepare(small, self.args, self.kwargs, self.aims.runtime, self.threads, self.call)
        clock = clock_for(self.device, self.threads)[1]
        rows = interleave([self.call, call, self.call], clock, self.seconds, enough, chained=True)
        if _timing(rows).noise <= UNSURE or enough(rows):
            return rows
        both = lambda more: np.concatenate([rows, more])  # noqa: E731
        # A busy machine: the same once more, for longer.
        return both(interleave([self.call, call, self.call], clock, 3 * self.seconds, lambda more: enough(both(more)), chained=True))

    def _own(self, small: nn.Module, enough: Callable[..., Any]) -> Any:
        models = {1: self.model, 2: small}
        assert self.aims.measure is not None
        measure = self.aims.measure
        clock = lambda call, repeats: _seconds(measure, models[call()])  # noqa: E731
        return interleave([lambda: 1, lambda: 2, lambda: 1], clock, 2 * self.seconds, enough, warm=False, chained=True)


def _timing(rows: np.ndarray) -> Timing:
    share, band = middle_of(rows[:, 1] / rows[:, [0, 2]].mean(axis=1))
    return Timing(float(np.median(rows[:, 1])), share, band, middle_of(rows[:, 0] / rows[:, 2])[0])


def _clear(timing: Timing, target: float | None) -> bool:
    """Whether more rounds would change nothing that matters: the time is met and the band narrow enough, or the time is not
    met and the band beyond what counts as met. The further off, the wider the band may be: only the next guess depends on it."""
    if timing.noise <= TOLERANCE / 3:
        return True
    if target is None:
        return False
    (low, high), off = timing.band, abs(timing.share / target - 1)
    if off <= TOLERANCE:
        return timing.noise <= TOLERANCE and target * (1 - CERTAIN) < low and high < target * (1 + CERTAIN)
    return timing.noise <= max(UNSURE, min(off / 4, NOISE / 2)) and (high < target * (1 - TOLERANCE) or low > target * (1 + TOLERANCE))


def _seconds(measure: Callable[[nn.Module], Any], model: nn.Module) -> float:
    """What the user's own measure says, checked."""
    try:
        answer = measure(model)
    except GraphpruneError:
        raise
    except Exception as error:
        raise BadMeasure(f"measure failed: {type(error).__name__}: {error}; it has to return the seconds of one call of the model it is given") from error
    try:
        seconds = float(answer)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds <= 0:
        raise BadMeasure(f"measure returned {answer!r}; it has to return the seconds of one call, a number above 0")
    return seconds


def reach(model: nn.Module, graph: Graph, aims: Aims, propose: Propose, scope: str = "layer") -> Plan:
    """The plan of the model that takes as long as asked, which says what was asked, predicted and measured.

    ``propose`` plans under a limit on predicted time. Raises :class:`~graphprune.errors.BadTarget` when the narrowest
    widths are not fast enough, and :class:`~graphprune.errors.BadMeasure`.
    """
    with tqdm(total=ATTEMPTS, desc="search: timing the operations", leave=False, disable=None) as shown:
        return _search(model, graph, aims, propose, scope, shown)


def _search(model: nn.Module, graph: Graph, aims: Aims, propose: Propose, scope: str, shown: tqdm) -> Plan:
    watch = Stopwatch(model, graph, aims)
    table = watch.table
    with using_threads(watch.threads):
        make = times(graph, table)
        full = _predicted(*propose({"time": (math.inf, make)})[:1], None, make)
    label = f"search {_name(graph, aims, scope)}"
    learnt = Learnt.read(table.known.get(label))
    pooled = Point if aims.measure else lambda now, share: learnt.pooled(now, share)
    points: list[tuple[float, float]] = [(0.0, 0.0)]
    target = aims.share(watch.alone() if isinstance(aims.latency, str) else 0.0)
    wanted, best = math.log(min(target, 1.0)), None
    for _ in range(ATTEMPTS):
        x = guess(points, wanted) if len(points) > 1 else learnt.first(wanted)
        groups, kept, plan = propose({"time": (full * math.exp(x), make)})
        now = math.log(_predicted(groups, kept, make) / full)
        if any(abs(now - other) < 1e-9 for other, _ in points[1:]):
            break  # the same widths again: the next ones are a whole unit away
        small = apply(model, plan)
        timing = watch(small, target, lambda share: math.exp(pooled(now, math.log(share)).measured))  # noqa: B023
        point = pooled(now, math.log(timing.share))
        learnt = learnt.told(point)
        points.append((point.predicted, point.measured))
        shown.set_description(f"search: {aims.asked} asked, {1 / timing.share:.2f}x measured", refresh=False)
        shown.update(1)
        error = max(abs(math.exp(point.measured) / target - 1), abs(timing.share / target - 1) - TOLERANCE)
        if wanted >= 0 and timing.share <= target:
            error = 0.0  # no faster than the original was asked for
        if best is None or error < best[0]:
            best = error, plan, point, timing
        if error <= TOLERANCE:
            break
        if now > x + math.log(1.02) and timing.share > target:
            raise _too_fast(aims, timing, priced(groups, {"time": make}), np.array([len(stay) for stay in kept], dtype=float), watch.device)
    assert best is not None
    table.known[label] = [list(point) for point in learnt.points]
    table.save()
    _, plan, point, timing = best
    return dataclasses.replace(plan, notes=(*plan.notes, _line(aims, point, timing, watch)))


def _too_fast(aims: Aims, timing: Timing, known: Costs, least: Array, device: torch.device) -> BadTarget:
    blocks = "\n".join(stays(known, least))
    starts = " On a GPU a small operation takes as long as starting it does, whatever its width: time more work in a call (a larger batch)."
    return BadTarget(
        f"{aims.asked}: the narrowest widths that the rules allow take {timing.share:.3f} of the original's time "
        f"({1 / timing.share:.2f}x faster; band {1 / timing.band[1]:.2f} to {1 / timing.band[0]:.2f}); that is the most that can be reached. "
        f"Fewer keep rules, a smaller min_units or multiple_of may help.{starts if device.type == 'cuda' else ''} What stays, largest first:\n{blocks}"
    )


def _predicted(groups: Groups, kept: Any, make: Callable[..., Any]) -> float:
    known = priced(groups, {"time": make})
    chosen = [torch.arange(group.size) for group in groups] if kept is None else kept
    return float(known.parts["time"](known.lengths.of(chosen)[None])[0])


def _name(graph: Graph, aims: Aims, scope: str) -> str:
    """A model's own correction: its operations with their arguments, dtypes and shapes, and whose clock it is."""
    text = "".join(f"{described(node)}{[v.shape for v in (*node.held, *node.outs)]}" for node in graph.nodes)
    return hashlib.sha256((text + scope + ("own" if aims.measure else "")).encode()).hexdigest()[:16]


def _line(aims: Aims, point: Point, timing: Timing, watch: Stopwatch) -> str:
    low, high = 1 / timing.band[1], 1 / timing.band[0]
    on = device_name(watch.device) if watch.device.type == "cuda" else f"{watch.threads} thread{'s' if watch.threads > 1 else ''}"
    where = "own measure" if aims.measure else f"{aims.runtime}, {on}"
    often = f"; {math.exp(-point.measured):.2f}x over the last {point.searches} searches" if point.searches > 1 else ""
    return (
        f"latency: asked {aims.asked}, predicted {math.exp(-point.predicted):.2f}x, measured {1 / timing.share:.2f}x ({low:.2f} to {high:.2f}; "
        f"{timing.seconds * 1e3:.2f} ms; the original against itself {timing.control:.3f}{often}); {where}"
    )


def steps(multiple_of: Any, graph: Graph, aims: Aims) -> int | Callable[[Groups], Mapping[int, int]]:
    """What widths are multiples of: the number given, or ("auto", and by default where a time is asked for) what the device likes."""
    if multiple_of is None:
        multiple_of = "auto" if aims.timed or aims.weight else 1
    if multiple_of != "auto":
        if not isinstance(multiple_of, int) or isinstance(multiple_of, bool) or multiple_of < 1:
            raise BadTarget(f'multiple_of is {multiple_of!r}; it is a whole number from 1 on, or "auto"')
        return multiple_of
    table = shared(graph, aims.runtime, aims.threads)

    known: dict[tuple[Any, ...], Mapping[int, int]] = {}

    def learnt(groups: Groups) -> Mapping[int, int]:
        if groups.key not in known:
            with using_threads(table.threads):
                known[groups.key] = alignments(groups, table)
        return known[groups.key]

    return learnt


def predicted(graph: Graph, aims: Aims, scope: str) -> dict[str, tuple[float, Callable[[Lengths], Times]]]:
    """The predicted time as a cost without a limit, where the aims are to be reached by fast widths; nothing otherwise."""
    if not aims.weight:
        return {}
    if scope != "allocated":
        raise BadTarget(f"objective={aims.objective!r} chooses every width by its time, and scope={scope!r} by the scores; leave one of them out")
    table = shared(graph, aims.runtime, aims.threads)

    def make(lengths: Lengths) -> Times:
        with using_threads(table.threads):
            return times(lengths.groups.graph, table)(lengths)

    return {"time": (math.inf, make)}
