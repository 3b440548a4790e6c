# pyright: strict, reportUnnecessaryIsInstance=false
"""Rows as a person, a spreadsheet, a notebook or a program wants them: :class:`Table`.

>>> widths = Table(("group", "before", "share"), (("conv1", 64, 0.25), ("conv2", 128, 0.5)), {"share": "{:.0%}".format})
>>> print(widths)
group  before  share
conv1      64    25%
conv2     128    50%
>>> widths.to_csv()
'group,before,share\\nconv1,64,0.25\\nconv2,128,0.5\\n'
"""

from __future__ import annotations

import csv
import html
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """Named columns and rows of plain values; ``formats`` say how a column is printed, its values stay what they are."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    formats: Mapping[str, Callable[[Any], str]] = field(default_factory=dict[str, Callable[[Any], str]], compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows as dictionaries."""
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        """The values of a column; raises KeyError for a name that is none."""
        if column not in self.columns:
            raise KeyError(f"no column {column!r}; there are {', '.join(self.columns)}")
        return [row[self.columns.index(column)] for row in self.rows]

    def cells(self) -> list[list[str]]:
        """Every row as text."""
        shown = [self.formats.get(column, _plain) for column in self.columns]
        return [["" if value is None else show(value) for show, value in zip(shown, row, strict=True)] for row in self.rows]

    def __str__(self) -> str:
        return aligned(self.columns, self.cells(), self._numbers())

    def __repr__(self) -> str:
        return f"Table({', '.join(self.columns)}; {len(self.rows)} rows)"

    def _numbers(self) -> list[bool]:
        """Which columns stand at the right."""
        values = [[value for value in column if value is not None] for column in zip(*self.rows, strict=True)] or [[] for _ in self.columns]
        return [bool(column) and all(isinstance(value, Number) and not isinstance(value, bool) for value in column) for column in values]

    def markdown(self) -> str:
        """The table in Markdown."""
        line = ["---:" if number else "---" for number in self._numbers()]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        return "\n".join("| " + " | ".join(row) + " |" for row in (self.columns, line, *cells))

    def _repr_html_(self) -> str:
        right = [' style="text-align:right"' if number else "" for number in self._numbers()]
        head = "".join(f"<th{side}>{html.escape(name)}</th>" for name, side in zip(self.columns, right, strict=True))
        body = "".join("<tr>" + "".join(f"<td{s}>{html.escape(c)}</td>" for c, s in zip(row, right, strict=True)) + "</tr>" for row in self.cells())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_csv(self, file: str | Path | None = None) -> str:
        """The rows as comma-separated values, unrounded, also written to ``file`` if there is one."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        if file is not None:
            Path(file).write_text(out.getvalue(), encoding="utf-8")
        return out.getvalue()

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``; raises ImportError where pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("Table.to_pandas needs pandas (pip install pandas); to_csv() and list(table) do without") from error
        return pandas.DataFrame(list(self.rows), columns=list(self.columns))


def _plain(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, Number):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Columns of text under their names, with two spaces between them."""
    wide = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [[cell.rjust(n) if side else cell.ljust(n) for cell, n, side in zip(row, wide, right, strict=True)] for row in (head, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)
