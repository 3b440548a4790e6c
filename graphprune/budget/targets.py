"""What was asked for, as limits: :func:`limits` checks the numbers, :func:`unreachable` says why a limit cannot be met.

A target is the share of the original that may stay when it is a float up to 1 (``macs=0.5``), and an absolute number
otherwise (``params=5_000_000``, ``size=20e6`` bytes). Several targets hold together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from torch import nn

from ..catalogue import enter
from ..cost import NAMES, Cost, Costs
from ..coupling.lengths import Prefixes
from ..errors import BadTarget
from ..operations.labels import Array
from ..options import OBJECTIVES

MOST_TIMES = 100  # a number with a fraction up to here is no absolute one: somebody means times

enter("target", "ratio", "the share of units removed in every group")
enter("target", "params", "parameters that may stay: a share of the original, or a number")
enter("target", "macs", "multiply-accumulates that may stay: a share of the original, or a number")
enter("target", "size", "bytes of parameters and buffers that may stay: a share of the original, or a number")
enter("target", "memory", "peak bytes of activations: a share of the original, or a number")
enter("target", "latency", 'measured time that may stay: a share of the original, or a time ("12 ms")')
enter("target", "speedup", "how many times faster, measured")

UNITS = {"params": "parameters", "macs": "MACs", "size": "bytes", "memory": "bytes of activations"}


@dataclass(frozen=True)
class Aims:
    """What :func:`~graphprune.shrink` was asked for besides a ratio; None where nothing was.

    ``latency`` is the share of the original's time that may stay, or a time with its unit ("12 ms"); ``speedup`` is the
    original's time over the new one. ``measure`` replaces the clock: a function (model) -> seconds. ``objective`` says what
    the other targets are spent on: 0 or "score", 1 or "time", or a number between.
    """

    params: Any = None
    macs: Any = None
    size: Any = None
    memory: Any = None
    latency: Any = None
    speedup: Any = None
    runtime: str = "eager"
    threads: int | None = None
    measure: Callable[[nn.Module], float] | None = None
    objective: str | float = "score"

    def __post_init__(self) -> None:
        for name in NAMES:
            _checked(name, getattr(self, name))
        self._check_time()
        self._check_objective()

    def _check_time(self) -> None:
        if self.latency is not None and self.speedup is not None:
            raise BadTarget(f"latency={self.latency!r} and speedup={self.speedup!r} say the same thing twice; give one of them")
        if self.speedup is not None and not (_number(self.speedup) and self.speedup >= 1):
            raise BadTarget(f"speedup is {self.speedup!r}; it is how many times faster the model shall be, a number from 1 on")
        if isinstance(self.latency, str):
            moment(self.latency)
        elif self.latency is not None and not (_number(self.latency) and 0 < self.latency <= 1):
            raise BadTarget(f'latency is {self.latency!r}; give the share of the original\'s time (0 < latency <= 1) or a time with its unit ("12 ms")')
        if self.measure is not None and not (callable(self.measure) and self.timed):
            raise BadTarget("measure is a function (model) -> seconds, and needs latency= or speedup=")

    def _check_objective(self) -> None:
        if self.objective not in OBJECTIVES if isinstance(self.objective, str) else not _within(self.objective):
            raise BadTarget(f'objective is {self.objective!r}; it is "score", "time", or a number between 0 (score) and 1 (time)')
        if self.weight and (self.timed or not self.any):
            raise BadTarget(
                f"objective={self.objective!r} spends a budget on the fastest widths: give one of {', '.join(NAMES)}; "
                "latency and speedup set the time themselves"
            )

    def limits(self, full: Cost) -> dict[str, float]:
        return limits(full, {name: getattr(self, name) for name in NAMES})

    @property
    def any(self) -> bool:
        return self.timed or any(getattr(self, name) is not None for name in NAMES)

    @property
    def timed(self) -> bool:
        return self.latency is not None or self.speedup is not None

    def share(self, reference: float) -> float:
        """The share of the original's time that is asked for, when that takes ``reference`` seconds."""
        if self.speedup is not None:
            return 1 / self.speedup
        return moment(self.latency) / reference if isinstance(self.latency, str) else float(self.latency)

    @property
    def scope(self) -> str:
        """The scope where none is given: widths that are to be fast differ from group to group."""
        return "allocated" if self.timed or self.weight else "layer"

    @property
    def weight(self) -> float:
        """How much time counts against the score, 0 to 1."""
        return OBJECTIVES[self.objective] if isinstance(self.objective, str) else float(self.objective)

    @property
    def asked(self) -> str:
        return f"{self.speedup:g}x faster" if self.speedup is not None else f"latency {self.latency}"


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _within(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _checked(name: str, value: Any) -> None:
    if value is not None and not (_number(value) and value > 0):
        raise BadTarget(f"{name} is {value!r}; give the share of the original that may stay (a float, 0 < {name} <= 1) or an absolute number (5_000_000)")
    if isinstance(value, float) and 1 < value <= MOST_TIMES:
        raise BadTarget(
            f"{name} is {value!r}, more than all; for {value:g} times less write {name}={1 / value:.3g} (a share), for so many in all a whole number"
        )


def moment(text: str) -> float:
    """Seconds of a time with its unit.

    >>> moment("12 ms"), moment("0.5s")
    (0.012, 0.5)
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(s|ms|us|µs)\s*", text)
    if not match or not float(match[1]) > 0:
        raise BadTarget(f'latency is {text!r}; write a time as "12 ms", "0.5 s" or "800 us"')
    return float(match[1]) * {"s": 1.0, "ms": 1e-3}.get(match[2], 1e-6)


def limits(full: Cost, targets: Mapping[str, Any]) -> dict[str, float]:
    """Absolute limits for the targets that are not None; raises :class:`~graphprune.errors.BadTarget`.

    >>> limits(Cost(1000, 2000, 4000, 500), {"macs": 0.5, "params": 300, "size": None})
    {'macs': 1000.0, 'params': 300.0}
    """
    absolute = {}
    for name, value in targets.items():
        if value is None:
            continue
        _checked(name, value)
        share = isinstance(value, float | np.floating) and value <= 1
        absolute[name] = float(value) * getattr(full, name) if share else float(value)
    return absolute


def show(name: str, value: float) -> str:
    """
    >>> show("macs", 4_089_184_256), show("size", 1_500_000), show("time", 0.0123)
    ('4,089,184,256 MACs', '1,500,000 bytes', '12.30 ms')
    """
    if name == "time":
        return f"{value * 1e3:.2f} ms"
    return f"{value:,.0f} {UNITS[name]}"


def unreachable(costs: Costs, lengths: Prefixes, least: Array, asked: Mapping[str, float], rules: str) -> BadTarget | None:
    """The error for limits below what the narrowest allowed widths (groups,) cost; None when all can be met."""
    reached = {name: float(values[0]) for name, values in costs.rowwise(lengths, least[None], list(asked)).items()}
    missed = [name for name, limit in asked.items() if reached[name] > limit * (1 + 1e-9)]
    if not missed:
        return None
    name = missed[0]
    text = f"{name}: at most {show(name, asked[name])} were asked for; the smallest reachable value is {show(name, reached[name])} ({rules})."
    return BadTarget(f"{text}\nWhat stays, largest first:\n" + "\n".join(stays(costs, least)))


def stays(costs: Costs, least: Array, count: int = 5) -> list[str]:
    """The largest weights that are left at the narrowest widths, and what holds their axes."""
    groups = costs.lengths.groups
    lengths = costs.lengths.linear(least[None])[0]
    rows = []
    for name, leaf in groups.graph.leaves.items():
        if name.startswith("<") or name not in groups.graph.parameters:
            continue
        sizes = [scale * float(lengths[form]) for scale, form in (costs.lengths.form(leaf, dim) for dim in range(len(leaf.shape)))]
        why = [f"axis {axis}: {groups.locked[name, axis]}" for axis in range(min(len(leaf.shape), 2)) if (name, axis) in groups.locked]
        rows.append((math.prod(sizes), f"  {name} ({' x '.join(f'{size:.0f}' for size in sizes)}): {'; '.join(why) or 'one unit per group has to stay'}"))
    return [text for _, text in sorted(rows, key=lambda row: -row[0])[:count]]
