"""A chart, histograms and points as SVG text: no script, no font, no time of day, so that the same data gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ..quantities import count
from ..wording import counted
from .chart import MARKS, Chart, Lane, Row, spread

HIGH, WIDE, ARCS, BAR = 20, 30, 74, 130  # of a row, a column, the arcs, a bar
COLOURS = 12  # classes c0 … c11 of the style sheet


def chart_svg(chart: Chart, colours: bool = False) -> str:
    """Rows with their names, lanes beside them, widths at the right, arcs at the left. Every element of a lane has the class ``g`` and its number; with
    ``colours`` the text carries its own style sheet, so that it is a file of its own.
    """
    names = max([len(_name(row)) for row in chart.rows] + [12]) * 7.0 + 20
    lanes = ARCS + names
    left = lanes + max(4, chart.columns) * WIDE + 24
    width, height = left + BAR + 112, (len(chart.rows) + 2) * HIGH
    of_row = _lanes_of_rows(chart)
    parts = [_head(width, height, colours)]
    parts += [_arc(start, end, of_row) for start, end in chart.arcs]
    parts.append(f'<text x="{ARCS + 8}" y="{HIGH - 6}" class="h">module</text><text x="{left}" y="{HIGH - 6}" class="h">width, before and after</text>')
    parts.append(f'<text x="{lanes}" y="{HIGH - 6}" class="h">coupled groups</text>')
    most = max((max(row.before, default=0) for row in chart.rows), default=1)
    for number, row in enumerate(chart.rows):
        parts.append(_row(number, row, of_row[number], left, most))
    for number, lane in enumerate(chart.lanes):
        parts.append(_lane(number, lane, lanes, chart.rows))
    return "".join([*parts, "</svg>"])


def _head(width: float, height: float, colours: bool) -> str:
    style = f"<style>{STYLE}{LIGHT}svg{{background:#fff;font:11px monospace}}</style>" if colours else ""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="map" {size} role="img" aria-label="modules, widths and coupled groups">{style}'


def _y(row: int) -> float:
    return (row + 1.5) * HIGH


def _name(row: Row) -> str:
    name = row.label if len(row.label) <= 52 else row.label[:51] + "…"
    return f"{name} ×{row.times}" if row.times > 1 else name


def _lanes_of_rows(chart: Chart) -> list[str]:
    classes: list[list[str]] = [[] for _ in chart.rows]
    for number, lane in enumerate(chart.lanes):
        for row, _ in lane.marks:
            classes[row].append(f"g{number}")
    return [" ".join(["n", *names]) for names in classes]


def _arc(start: int, end: int, of_row: Sequence[str]) -> str:
    """Next rows are joined by a short line, others by an arc at the left, as far out as they are apart; what goes back up is dashed."""
    x, (y1, y2) = ARCS, (_y(start), _y(end))
    if end == start + 1:
        return f'<path class="a" d="M{x} {y1 + 4}V{y2 - 4}"/>'
    out = x - min(ARCS - 6, 10 + 9 * math.sqrt(abs(end - start)))
    return f'<path class="a{" back" if end < start else ""}" d="M{x} {y1:.0f}C{out:.0f} {y1:.0f} {out:.0f} {y2:.0f} {x - 3} {y2:.0f}"/>'


def _row(number: int, row: Row, classes: str, left: float, most: int) -> str:
    y, widest, narrow = _y(number), max(row.before, default=0), max(row.after, default=0)
    full, kept = (BAR * math.sqrt(size / most) if most else 0.0 for size in (widest, narrow))
    facts = [
        f"{', '.join(row.paths[:6])}{', …' if len(row.paths) > 6 else ''}",
        f"{count(row.params)} parameters",
        *(f"whole: {text}" for text in row.locks[:4]),
    ]
    width = spread(row.before) if row.before == row.after else f"{spread(row.before)} → {spread(row.after)}"
    lock = f'<text x="{ARCS - 2}" y="{y + 4:.0f}" class="l">&#9632;</text>' if row.locks else f'<circle cx="{ARCS}" cy="{y:.0f}" r="3" class="d"/>'
    return (
        f'<g class="{classes} r"><title>{escape(chr(10).join(facts))}</title>{lock}<text x="{ARCS + 12}" y="{y + 4:.0f}">{escape(_name(row))}</text>'
        f'<rect x="{left:.0f}" y="{y - 6:.0f}" width="{full:.1f}" height="12" class="f"/><rect x="{left:.0f}" y="{y - 6:.0f}" width="{kept:.1f}" height="12"'
        f' class="k"/><text x="{left + BAR + 6:.0f}" y="{y + 4:.0f}" class="w">{width}</text></g>'
    )


def _lane(number: int, lane: Lane, left: float, rows: Sequence[Row]) -> str:
    x, (first, last), colour = left + (lane.column + 0.5) * WIDE, lane.span, f"c{number % COLOURS}"
    units = spread(lane.before) if lane.before == lane.after else f"{spread(lane.before)} → {spread(lane.after)}"
    times = f"{counted(lane.times, 'group')}, " if lane.times > 1 else ""
    where = "\n".join(f"{MARKS[role]} them: {rows[row].label}" for row, role in lane.marks)
    line = f'<path d="M{x:.0f} {_y(first):.0f}V{_y(last):.0f}"/>' if last > first else ""
    marks = "".join(_mark(x, _y(row), role) for row, role in lane.marks)
    text = f'<text x="{x + 6:.0f}" y="{_y(first) - 5:.0f}" class="w">×{lane.times}</text>' if lane.times > 1 else ""
    title = escape(f"{lane.label}\n{times}{units} units\n{where}")
    return f'<g class="n g{number} {colour} lane" tabindex="0"><title>{title}</title>{line}{marks}{text}</g>'


def _mark(x: float, y: float, role: str) -> str:
    if role == "produces":
        return f'<circle cx="{x:.0f}" cy="{y:.0f}" r="6" class="made"/>'
    if role == "consumes":
        return f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4.5" class="read"/>'
    return f'<path d="M{x - 5:.0f} {y:.0f}h10" class="pass"/>'


def highlight(chart: Chart) -> str:
    """Style rules that light a group and its modules up where either is pointed at, or reached by the keyboard."""
    rules = []
    for number in range(len(chart.lanes)):
        one = f".g{number}"
        rules.append(f".map:has({one}:hover) {one},.map:has({one}:focus-visible) {one}{{opacity:1;font-weight:700}}")
    return ".map:has(.n:hover) .n,.map:has(.n:focus-visible) .n{opacity:.18}" + "".join(rules)


def histogram_svg(scores: Sequence[float], cut: float | None, title: str, note: str, bins: int = 32) -> str:
    """How often each score occurs in a group; left of the line the units go."""
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    step = (high - low) / bins or 1.0
    heights = [0] * bins
    for value in scores:
        heights[min(bins - 1, int((value - low) / step))] += 1
    top, width, height = max(heights) or 1, 200, 56
    bars = []
    for at, tall in enumerate(heights):
        if tall:
            size = max(1.0, 44 * tall / top)
            gone = cut is not None and low + (at + 0.5) * step < cut
            box = f'x="{at * width / bins:.1f}" y="{height - size:.1f}" width="{width / bins - 0.6:.1f}" height="{size:.1f}"'
            bars.append(f'<rect {box} class="{"f" if gone else "k"}"/>')
    at = None if cut is None or high == low else min(max((cut - low) / (high - low), 0.0), 1.0) * width
    line = "" if at is None else f'<path d="M{at:.1f} 4V{height}" class="cut"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(note)}">'
    return f"<figure>{svg}{''.join(bars)}{line}</svg><figcaption>{escape(title)}<br><small>{escape(note)}</small></figcaption></figure>"


def points_svg(points: Sequence[tuple[float, float, str, bool]], x: str, y: str) -> str:
    """Points (x share, value, text, whether on the front); those on the front are joined."""
    width, height, edge = 420, 260, 48
    lowest, highest = min(v for _, v, _, _ in points), max(v for _, v, _, _ in points)
    room = (highest - lowest) or 1.0
    right = max(1.0, max(s for s, _, _, _ in points))

    def place(share: float, value: float) -> tuple[float, float]:
        return edge + share / right * (width - edge - 14), 12 + (highest - value) / room * (height - edge - 12)

    front = [place(s, v) for s, v, _, best in sorted(points) if best]
    marks = []
    for share, value, text, best in points:
        px, py = place(share, value)
        marks.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" class="{"k" if best else "f"}"><title>{escape(text)}</title></circle>')
    line = f'<path class="front" d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in front)}"/>' if len(front) > 1 else ""
    ticks = [
        f'<text x="{place(s, lowest)[0]:.0f}" y="{height - edge + 18}" text-anchor="middle">{s:.0%}</text>' for s in (0.0, 0.25, 0.5, 0.75, 1.0) if s <= right
    ]
    ticks += [f'<text x="{edge - 6}" y="{place(0, v)[1] + 4:.0f}" text-anchor="end">{v:.4g}</text>' for v in sorted({lowest, highest})]
    frame = f'<path class="a" d="M{edge} 12V{height - edge}H{width - 14}"/>'
    names = f'<text x="{width / 2:.0f}" y="{height - 10}" text-anchor="middle">{escape(x)}</text><text x="4" y="10">{escape(y)}</text>'
    label = f'role="img" aria-label="{escape(y)} against {escape(x)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" {label}>'
        f"{frame}{''.join(ticks)}{names}{line}{''.join(marks)}</svg>"
    )


PALETTE = ("#1f77b4", "#d1495b", "#2e933c", "#8e5bb5", "#c77700", "#00838f", "#a83279", "#5a7d2a", "#3f51b5", "#b23c17", "#607d8b", "#997a00")
STYLE = "".join(f".c{at}{{--c:{colour}}}" for at, colour in enumerate(PALETTE)) + (
    "svg text{font:11px ui-monospace,monospace;fill:var(--ink)}.map .h{fill:var(--dim)}.map .w{fill:var(--dim)}.map .l{fill:var(--lock);font-size:9px}"
    ".map .d{fill:var(--dim)}.f{fill:var(--faint)}.k{fill:var(--kept)}.a{fill:none;stroke:var(--line);stroke-width:1.2}.back{stroke-dasharray:3 3}"
    ".lane path{stroke:var(--c);stroke-width:3;fill:none}.lane .made{fill:var(--c)}.lane .read{fill:var(--paper);stroke:var(--c);stroke-width:2.5}"
    ".lane .pass{stroke-width:4}.lane:focus{outline:none}.n{transition:opacity .12s}.cut{stroke:var(--lock);stroke-width:1.5}"
    ".front{fill:none;stroke:var(--kept);stroke-width:2}"
)
LIGHT = ":root{--paper:#fff;--ink:#1b1f24;--dim:#5c6670;--line:#c4ccd4;--faint:#d6dde4;--kept:#2f6fb0;--lock:#c0392b;--panel:#f5f7f9}"
DARK = ":root{--paper:#14181d;--ink:#e4e8ec;--dim:#9aa5b1;--line:#465362;--faint:#37424e;--kept:#5b9bd8;--lock:#ff7b6b;--panel:#1c2229}"
