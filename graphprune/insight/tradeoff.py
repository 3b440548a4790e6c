# pyright: strict, reportPrivateUsage=false
"""What a cut costs and what it saves: :func:`tradeoff` evaluates several budgets, from one trace and one score.

>>> import torch
>>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
>>> found = tradeoff(net, torch.zeros(1, 4), lambda model: 1.0, shares=(0.5,), measure=False, progress=False)
>>> [(point.asked, point.params, point.value) for point in found.points]
[(1.0, 226, 1.0), (0.5, 114, 1.0)]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..cutting.plan import Plan, note_plan
from ..errors import BadOption, BadTarget
from ..options import Repair, Runtime
from ..quantities import amount
from ..repair import after_cut, before_cut
from ..scores.data import bar
from ..tables import Table
from ..timing.measure import measure as measured
from .axes import axes_for, drawn
from .study import Evaluate, Study

BUDGETS = ("macs", "params", "size", "memory", "ratio")
AXES = {"macs": "MACs left", "params": "parameters left", "seconds": "measured time left"}


@dataclass(frozen=True)
class Point:
    """One budget: what was asked (a share that stays), parameters and MACs left, the metric, and the measured seconds with the speedup and its band."""

    asked: float
    params: int
    macs: int
    value: float
    seconds: float | None = None
    speedup: float | None = None
    band: tuple[float, float] | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Tradeoff:
    """The points that :func:`tradeoff` found, the original first; ``missed`` says which budgets could not be met, and why."""

    budget: str
    points: tuple[Point, ...]
    missed: tuple[str, ...] = ()

    def front(self, by: str = "macs") -> tuple[Point, ...]:
        """The points that no other beats in both the metric and ``by`` ("macs", "params" or "seconds"), the largest first."""
        if by not in AXES:
            raise BadOption(f"no front by {by!r}; there are {', '.join(map(repr, AXES))}")
        points = sorted((point for point in self.points if getattr(point, by) is not None), key=lambda point: (getattr(point, by), -point.value))
        front: list[Point] = []
        for point in points:
            if not front or point.value > front[-1].value:
                front.append(point)
        return tuple(reversed(front))

    def table(self) -> Table:
        """One row for every point; ``front`` names the costs in which no other point beats it."""
        whole = self.points[0]
        fronts = {by: set(map(id, self.front(by))) for by in AXES if getattr(whole, by) is not None}
        columns = ("asked", "value", "params", "macs", "params left", "macs left", "ms", "speedup", "low", "high", "front")
        rows: list[tuple[Any, ...]] = []
        for point in self.points:
            low, high = point.band or (None, None)
            best = " ".join(by for by, ids in fronts.items() if id(point) in ids)
            shares = (point.params / whole.params, point.macs / max(1, whole.macs))
            rows.append((point.asked, point.value, point.params, point.macs, *shares, _ms(point.seconds), point.speedup, low, high, best))
        shown: Callable[[Any], str] = lambda value: f"{100 * value:.1f} %"  # noqa: E731
        percent = {name: shown for name in ("asked", "params left", "macs left")}
        return Table(columns, tuple(rows), percent)

    def to_csv(self, file: Any = None) -> str:
        return self.table().to_csv(file)

    def plot(self, target: Any = None, by: str = "macs") -> Any:
        """The metric against MACs, parameters or time left, the front as a line; ``target`` is a file, matplotlib axes, or nothing. Returns the axes."""
        axes = axes_for(target)
        front, whole = self.front(by), getattr(self.points[0], by)
        points = [point for point in self.points if getattr(point, by) is not None]
        axes.plot([getattr(point, by) / whole for point in points], [point.value for point in points], "o", color="0.6")
        axes.plot([getattr(point, by) / whole for point in front], [point.value for point in front], "o-")
        axes.set_xlabel(AXES[by])
        axes.set_ylabel("evaluate")
        return drawn(axes, target)

    def __str__(self) -> str:
        return "\n".join([str(self.table()), *(f"not met: {text}" for text in self.missed)])

    def __repr__(self) -> str:
        return f"<Tradeoff: {len(self.points)} points by {self.budget}, {len(self.front())} on the front>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def tradeoff(
    model: nn.Module,
    example_input: Any,
    evaluate: Evaluate,
    *,
    shares: Sequence[Any] = (0.9, 0.75, 0.6, 0.45, 0.3),
    by: str = "macs",
    measure: bool = True,
    seconds: float = 5.0,
    on: Runtime | None = None,
    repair: Any = None,
    score: Any = "l2",
    scope: str | None = None,
    keep: Any = (),
    widths: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    progress: bool = True,
) -> Tradeoff:
    """Cut to several budgets, evaluate and time each; the model is traced once, scored once, and left as it is.

    - ``evaluate(model)`` returns one number, larger is better; it gets each cut model, repaired if ``repair`` is given.
    - ``shares`` of the budget ``by`` that stay ("macs", "params", "size", "memory"; "ratio": of the units), numbers or text (``"50%"``).
    - ``measure``: whether every point is timed against the original with :func:`graphprune.measure`, ``seconds`` long each, on ``on``
      (:class:`graphprune.Runtime`: name and threads).
    - ``repair``, ``score``, ``scope``, ``keep``, ``widths``: those of :func:`graphprune.shrink`.

    A budget that cannot be met is listed in ``missed``. Raises :class:`~graphprune.errors.BadOption`, :class:`~graphprune.errors.BadTarget`,
    and :class:`~graphprune.errors.BadScore` where ``evaluate`` fails.
    """
    if by not in BUDGETS:
        raise BadOption(f"by is {by!r}; it is one of {', '.join(map(repr, BUDGETS))}")
    asked = sorted({_share(share) for share in shares}, reverse=True)
    clock, repairs = on or Runtime(), before_cut(model, Repair.of(repair))
    study = Study(model, example_input, score, example_kwargs, scope=scope, keep=keep, widths=widths)
    points = [Point(1.0, 0, 0, study.value(evaluate, model, "the original"))]
    missed: list[str] = []
    for share in bar(asked, "tradeoff", progress):
        try:
            plan = study.plan(1 - share) if by == "ratio" else study.plan(None, {by: share})
        except BadTarget as error:
            missed.append(f"{by} {100 * share:g}%: {str(error).splitlines()[0]}")
            continue
        outline = plan.outline
        assert outline is not None  # plans of widths have one
        small = study.cut(plan)
        note_plan(small, plan)
        small, plan = after_cut(small, model, plan, repairs, study.graph)
        point = Point(share, *outline.after, study.value(evaluate, small, f"the model at {by} {100 * share:g}%"), plan=plan)
        if measure:
            timing = measured(small, example_input, model, example_kwargs=example_kwargs, runtime=clock.name, threads=clock.threads, seconds=seconds)
            point = replace(point, seconds=timing.seconds, speedup=timing.speedup, band=timing.band)
            points[0] = replace(points[0], seconds=timing.reference, speedup=1.0, band=(1.0, 1.0))
        points[0] = replace(points[0], params=outline.before.params, macs=outline.before.macs)
        points.append(point)
    if len(points) == 1:
        raise BadTarget("none of these budgets can be met:\n" + "\n".join(missed))
    return Tradeoff(by, tuple(points), tuple(missed))


def _share(value: Any) -> float:
    share = amount("ratio", value)
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
        raise BadOption(f"{value!r} is no share that stays; give numbers between 0 and 1, or text such as '50%'")
    return float(share)
