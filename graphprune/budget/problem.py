"""Which widths to choose, as data: :class:`Problem` holds what every level loses and what must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..cost import Costs
from ..coupling.lengths import Prefixes
from ..operations.labels import Array
from .ledger import Ledger
from .space import Space

SLACK = 1e-12  # by which a share of a limit may exceed 1: the rounding of sums


@dataclass(frozen=True)
class Problem:
    """Which level of every choice: what each loses (``losses``, (levels,) for each choice), and what must hold.

    ``time`` above 0 needs a limit "time", which may be infinite.
    """

    losses: list[Array]
    limits: Mapping[str, float]
    known: Costs
    allowed: Space
    lengths: Prefixes
    time: float = 0.0

    @property
    def bounds(self) -> Array:
        """The limits, (limits,)."""
        return np.array(list(self.limits.values()))

    def shares(self, at: Array) -> Array:
        """Costs as shares of their limits, (rows, limits), at level numbers (rows, choices)."""
        costs = self.known.rowwise(self.lengths, self.allowed.widths(at), list(self.limits))
        return np.stack([costs[name] / limit for name, limit in self.limits.items()], axis=1)

    def seconds(self, at: Array) -> Array:
        return self.known.rowwise(self.lengths, self.allowed.widths(at), ["time"])["time"]

    def ledger(self, at: Array | None = None) -> Ledger:
        return Ledger(self.known, self.allowed, self.lengths, list(self.limits), at)


def fits(shares: Array) -> Array:
    """Whether all limits hold, (rows,), for shares (rows, limits)."""
    return np.all(shares <= 1 + SLACK, axis=-1)
