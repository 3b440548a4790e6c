"""All that is asked of :func:`graphprune.shrink`, as one value: :class:`Request`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..budget.targets import Aims
from ..cost import NAMES, cost
from ..coupling.groups import couple
from ..errors import BadRatio, BadTarget
from ..granularity.spec import Spec
from ..tracing.trace import Graph

REASONS = {
    "size": "masked entries are stored as zeros: ask for params= or macs=",
    "memory": "it leaves every activation as large as it is: cut channels",
}


@dataclass(frozen=True)
class Request:
    """What :func:`~graphprune.shrink` was asked for; ``keep`` names tensors, ``ratios`` is for :mod:`graphprune.names` to read.

    ``multiple_of`` may become a function of the groups, and ``more`` maps the name of a further cost to (its limit, how to
    make it; see :func:`~graphprune.cost.costs`), once the graph is known.
    """

    spec: Spec
    aims: Aims
    ratio: float
    scope: str
    criterion: Any
    batches: Iterable | None
    loss: Callable | None
    keep: Sequence[str]
    ratios: Any
    multiple_of: Any
    min_units: int
    rewrite: bool
    inplace: bool
    more: Mapping[str, tuple[float, Callable]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.spec.coarse:
            return
        if self.multiple_of not in (None, 1) or self.min_units != 1:
            raise BadRatio("multiple_of= and min_units= are about widths; they go with granularity 'channel' or 'head'")
        if self.aims.timed or self.aims.weight:
            text = f"with granularity 'channel' or 'head'; {self.spec.text!r} takes a ratio, params= or macs="
            raise BadTarget(f"latency=, speedup= and objective= are met by widths, {text}")

    @property
    def plain(self) -> bool:
        """Whether one ratio decides, group by group."""
        return self.scope == "layer" and not self.more and not self.aims.any and isinstance(self.multiple_of, int)

    def limits(self, graph: Graph, allowed: Sequence[str]) -> dict[str, float]:
        """The absolute limits; raises :class:`~graphprune.errors.BadTarget` for those that the granularity cannot meet."""
        asked = [name for name in NAMES if getattr(self.aims, name) is not None]
        for name in asked:
            if name not in allowed:
                raise BadTarget(f"{name}= cannot be met with granularity {self.spec.text!r}: {REASONS.get(name, 'it says itself how much goes')}")
        return self.aims.limits(cost(couple(graph))) if asked else {}
