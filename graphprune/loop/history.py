"""What a run of several rounds did: a row per round, as text, as Markdown, as a plot.

>>> print(History((Row(0, 0.0, 100, 1000, None, 0.9), Row(1, 0.5, 60, 500, 0.7, 0.88))))
round  asked  parameters       MACs  after the cut  after training
    0   0.00         100      1,000                         0.9000
    1   0.50    60 (60%)  500 (50%)         0.7000          0.8800
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..insight.axes import axes_for, drawn

HEAD = ("round", "asked", "parameters", "MACs", "after the cut", "after training")


@dataclass(frozen=True)
class Row:
    """One round: the share that should be gone, what is left, and ``evaluate`` right after the cut and after training.

    ``good``: at or above the floor.
    """

    round: int
    asked: float
    params: int
    macs: int
    cut: float | None = None
    trained: float | None = None
    good: bool = True


@dataclass(frozen=True)
class History:
    """The rows of all rounds; row 0 is the original."""

    rows: tuple[Row, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def with_row(self, row: Row) -> History:
        """The same history with one more row, or with this round's row exchanged."""
        return History((*(other for other in self.rows if other.round != row.round), row))

    def cells(self) -> list[tuple[str, ...]]:
        first = self.rows[0] if self.rows else None

        def part(value: int, whole: int) -> str:
            return f"{value:,}" if value == whole else f"{value:,} ({value / whole:.0%})"

        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.4f}"

        return [
            (str(row.round), f"{row.asked:.2f}", part(row.params, first.params), part(row.macs, first.macs), number(row.cut), number(row.trained))
            for row in self.rows
            if first
        ]

    def __str__(self) -> str:
        lines = [HEAD, *self.cells()]
        wide = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
        return "\n".join("  ".join(text.rjust(n) for text, n in zip(line, wide, strict=True)) for line in lines)

    def markdown(self) -> str:
        """The table in Markdown."""
        return "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, ("---",) * len(HEAD), *self.cells()))

    def plot(self, target: Any = None) -> Any:
        """Accuracy against the MACs left, after each cut and after each training; returns the axes.

        ``target`` is a file to write, matplotlib axes to draw on, or nothing. Needs matplotlib (``pip install 'graphprune[report]'``).
        """
        axes = axes_for(target)
        whole = self.rows[0].macs
        for name, style in (("trained", "o-"), ("cut", "x--")):
            points = [(row.macs / whole, getattr(row, name)) for row in self.rows if getattr(row, name) is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], style, label={"trained": HEAD[5], "cut": HEAD[4]}[name])
        axes.set_xlabel("MACs left")
        axes.set_ylabel("evaluate")
        axes.legend()
        return drawn(axes, target)

    def to_dict(self) -> list[dict[Any, Any]]:
        return [asdict(row) for row in self.rows]

    @classmethod
    def from_dict(cls, rows: list[Mapping[str, Any]]) -> History:
        return cls(tuple(Row(**row) for row in rows))
