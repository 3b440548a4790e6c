"""How coarsely to prune, by the textbook's names.

>>> parse("2:4").keep, parse("vector:column").option
(2, 'column')
>>> Spec("n:m", "2:4", 2, 4).text, Spec("weight", "0.01").threshold
('2:4', 0.01)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..catalogue import enter, entry, names
from ..errors import BadRatio, UnknownName
from ..wording import nearest

NAMES = {
    "channel": "whole channels and every slice coupled to them: dense and smaller (the default)",
    "head": "attention heads alone; every other axis stays: dense and smaller",
    "block": "whole residual blocks and elements of chains: the modules are gone",
    "layer": "residual branches and hidden layers of a chain: the modules are gone",
    "group": "the same (channel, tap) pairs in every filter: a smaller kernel, a thinner product where measured faster, else masked",
    "group:box": "whole rows and columns of every kernel of a layer: a smaller dense kernel",
    "kernel": "one filter x one input channel: masked",
    "vector": "rows of kernels (vector:column: columns): masked",
    "weight": "single weights by ratio, or by a threshold on the score (weight:0.01): masked",
    "n:m": "n of every m neighbours stay, as in 2:4: masked; CUDA has kernels for 2:4 (semi_structured)",
}
for _name, _line in NAMES.items():
    enter("granularity", _name, _line)
SAME = {"channels": "channel", "heads": "head", "layers": "block"}  # as they are called in a table of widths
# What other tools call them.
ELSEWHERE = {
    **dict.fromkeys(("filter", "filters", "neuron", "neurons", "unit", "units", "feature", "features", "structured"), "channel"),
    **dict.fromkeys(("unstructured", "weights", "element", "elements"), "weight"),
    **dict.fromkeys(("attention", "attention_heads", "num_heads"), "heads"),
    **dict.fromkeys(("ffn", "intermediate", "intermediate_size"), "mlp"),
    **dict.fromkeys(("hidden_size", "embedding", "embed_dim", "stream"), "hidden"),
    **dict.fromkeys(("depth", "num_layers"), "layers"),
    **dict.fromkeys(("vocab", "vocab_size", "tokens"), "vocabulary"),
}
OPTIONS = {"group": ("box",), "vector": ("row", "column")}


@dataclass(frozen=True)
class Spec:
    """What a granularity asks for: its name, an option after the colon, and n:m."""

    name: str
    option: str = ""
    keep: int = 0
    of: int = 0

    @property
    def coarse(self) -> bool:
        """Are whole axes cut, as the engine's groups say?"""
        return self.name in ("channel", "head") or "cut" in entry("granularity", self.name).facts

    @property
    def apart(self) -> bool:
        """Are its units those of another reading of the run, in which copies go instead of what is copied?"""
        return entry("granularity", self.name).facts.get("apart", False)

    @property
    def alone(self) -> bool:
        """Does it need a plan of its own, since other units stay whole for it, or are others?"""
        return self.apart or self.locks is not None or self.coupled is not None

    @property
    def locks(self) -> Callable[..., Any] | None:
        """What of a run stays whole so that its units may go."""
        return entry("granularity", self.name).facts.get("locks")

    @property
    def coupled(self) -> Callable[..., Any] | None:
        """How a run is coupled so that its units may go, where that is another way than that of all others."""
        return entry("granularity", self.name).facts.get("coupled")

    @property
    def masks(self) -> bool:
        """Do entries become zero in a weight that keeps its size, so that a second ratio counts them again?"""
        return not self.coarse and self.name not in ("block", "layer") and self.option != "box"

    @property
    def says_itself(self) -> bool:
        """Does its text say how much goes, whatever is asked for beside it?"""
        return self.name == "n:m" or self.threshold is not None

    @property
    def text(self) -> str:
        """As the user wrote it."""
        return self.option if self.name == "n:m" else f"{self.name}:{self.option}" if self.option else self.name

    @property
    def threshold(self) -> float | None:
        try:
            return float(self.option)
        except ValueError:
            return None


def parse(granularity: str) -> Spec:
    """Read a granularity; raises :class:`~graphprune.errors.UnknownName` (with the nearest name) or BadRatio for an odd n:m."""
    if not isinstance(granularity, str):
        raise UnknownName(f"granularity is {granularity!r}; it is one of {', '.join(NAMES)}")
    pair = re.fullmatch(r"(\d+):(\d+)", granularity)
    if pair:
        keep, of = int(pair[1]), int(pair[2])
        if not 0 < keep < of:
            raise BadRatio(f"{granularity} is no n:m sparsity: n of every m entries stay, with 0 < n < m, as in 2:4")
        return Spec("n:m", granularity, keep, of)
    granularity = SAME.get(granularity, granularity)
    name, colon, option = granularity.partition(":")
    number = colon and name in ("weight", "kernel", "vector") and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", option)
    if name not in names("granularity") or name == "n:m" or (colon and option not in OPTIONS.get(name, ()) and not number):
        known = [*names("granularity"), "2:4"]
        near = [each for each in [ELSEWHERE.get(granularity.lower())] if each in known] or nearest(granularity, known, 1, 0.3)
        raise UnknownName(f"no granularity {granularity!r}; {f'the nearest is {near[0]!r}; ' if near else ''}there are {', '.join(names('granularity'))}")
    return Spec(name, option)
