"""The chart of a model as a picture: :func:`picture` writes SVG as it is, and PNG or PDF with matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from ..coupling.groups import couple
from ..cutting.plan import Plan
from ..tracing.trace import trace
from .axes import axes_for, drawn, filed
from .chart import Chart, chart, spread
from .svg import PALETTE, chart_svg


def picture(model: nn.Module, example_input: Any, plan: Plan | None = None, target: Any = None, *, example_kwargs: dict[str, Any] | None = None) -> Any:
    """Modules, their widths, and the groups that are cut together, as one picture.

    ``target`` is a file (``.svg`` needs no library, ``.png`` and ``.pdf`` need matplotlib), matplotlib axes, or nothing. Returns the path or the axes.

    >>> import tempfile, torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> picture(net, torch.zeros(1, 4), target=Path(tempfile.mkdtemp()) / "net.svg").read_text()[:4]
    '<svg'
    """
    drawing = chart(couple(trace(model, example_input, example_kwargs)), plan.outline if plan is not None else None)
    if isinstance(target, str | Path) and str(target).endswith(".svg"):
        with filed(Path(target)) as part:
            part.write_text(chart_svg(drawing, colours=True), encoding="utf-8")
        return Path(target)
    axes = axes_for(target, 9 + 0.25 * drawing.columns, 1 + 0.24 * len(drawing.rows))
    _draw(drawing, axes)
    drawn(axes, target)
    return Path(target) if isinstance(target, str | Path) else axes


def _draw(drawing: Chart, axes: Any) -> None:
    most = max((max(row.before, default=0) for row in drawing.rows), default=1) or 1
    for at, row in enumerate(drawing.rows):
        wide, kept = (3 * math.sqrt(max(sizes, default=0) / most) for sizes in (row.before, row.after))
        axes.barh(at, wide, 0.62, color="0.85")
        axes.barh(at, kept, 0.62, color="#2f6fb0")
        width = spread(row.before) if row.before == row.after else f"{spread(row.before)} → {spread(row.after)}"
        axes.text(3.05, at, width, va="center", fontsize=7, color="0.35")
    for number, lane in enumerate(drawing.lanes):
        x, colour = 4.6 + 0.3 * lane.column, PALETTE[number % len(PALETTE)]
        axes.plot([x, x], lane.span, color=colour, linewidth=1.8)
        for role, mark in (("produces", "o"), ("passes", "_"), ("consumes", "o")):
            rows = [row for row, marked in lane.marks if marked == role]
            axes.plot([x] * len(rows), rows, mark, color=colour, markersize=5, markerfacecolor=colour if role == "produces" else "white")
        if lane.times > 1:
            axes.text(x + 0.06, lane.span[0] - 0.35, f"×{lane.times}", fontsize=6, color="0.35")
    names = [f"{row.label} ×{row.times}" if row.times > 1 else row.label for row in drawing.rows]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks([])
    axes.set_ylim(len(names) - 0.4, -0.9)
    axes.set_xlim(0, 4.8 + 0.3 * drawing.columns)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
