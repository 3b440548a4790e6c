"""What was asked for, as limits: :func:`limits` checks the numbers, :func:`unreachable` says why a limit cannot be met.

A target is the share of the original that may stay when it is a float up to 1 (``macs=0.5``), and an absolute number
otherwise (``params=5_000_000``, ``size=20e6`` bytes). Several targets hold together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from .cost import NAMES, Cost, Costs
from .errors import BadTarget
from .labels import Array


@dataclass(frozen=True)
class Aims:
    """What :func:`~graphprune.shrink` was asked for besides a ratio; None where nothing was."""

    params: Any = None
    macs: Any = None
    size: Any = None
    memory: Any = None

    def limits(self, full: Cost) -> dict[str, float]:
        return limits(full, {name: getattr(self, name) for name in NAMES})

    @property
    def any(self) -> bool:
        return any(getattr(self, name) is not None for name in NAMES)


def limits(full: Cost, given: Mapping[str, Any]) -> dict[str, float]:
    """Absolute limits for the targets that are not None; raises :class:`~graphprune.errors.BadTarget`.

    >>> limits(Cost(1000, 2000, 4000, 500), {"macs": 0.5, "params": 300, "size": None})
    {'macs': 1000.0, 'params': 300.0}
    """
    found = {}
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise BadTarget(f"{name} is {value!r}; give the share of the original that may stay (a float, 0 < {name} <= 1) or an absolute number (5_000_000)")
        share = isinstance(value, float | np.floating) and value <= 1
        found[name] = float(value) * getattr(full, name) if share else float(value)
    return found


def show(name: str, value: float) -> str:
    """
    >>> show("macs", 4_089_184_256), show("size", 1_500_000), show("time", 0.0123)
    ('4,089,184,256 MACs', '1,500,000 bytes', '12.30 ms')
    """
    if name == "time":
        return f"{value * 1e3:.2f} ms"
    return f"{value:,.0f} {dict(zip(NAMES, ('parameters', 'MACs', 'bytes', 'bytes of activations'), strict=True))[name]}"


def unreachable(costs: Costs, least: Array, asked: Mapping[str, float], rules: str) -> BadTarget | None:
    """The error for limits below what the narrowest allowed widths (groups,) cost; None when all can be met."""
    reached = {name: float(values[0]) for name, values in costs.at(least[None], list(asked)).items()}
    missed = [name for name, limit in asked.items() if reached[name] > limit * (1 + 1e-9)]
    if not missed:
        return None
    name = missed[0]
    text = f"{name}: at most {show(name, asked[name])} were asked for; the smallest reachable value is {show(name, reached[name])} ({rules})."
    return BadTarget(f"{text}\nWhat stays, largest first:\n" + "\n".join(_stays(costs, least)))


def _stays(costs: Costs, least: Array, count: int = 5) -> list[str]:
    """The largest weights that are left at the narrowest widths, and what holds their axes."""
    groups = costs.lengths.groups
    found = (costs.constant + costs.slopes @ least)[None]
    rows = []
    for name, leaf in groups.graph.leaves.items():
        if name.startswith("<") or name not in groups.graph.__dict__["parameters"]:
            continue
        sizes = [scale * float(found[0, form]) for scale, form in (costs.lengths.form(leaf, dim) for dim in range(len(leaf.shape)))]
        why = [f"axis {axis}: {groups.locked[name, axis]}" for axis in range(min(len(leaf.shape), 2)) if (name, axis) in groups.locked]
        rows.append((math.prod(sizes), f"  {name} ({' x '.join(f'{size:.0f}' for size in sizes)}): {'; '.join(why) or 'one unit per group has to stay'}"))
    return [text for _, text in sorted(rows, key=lambda row: -row[0])[:count]]
