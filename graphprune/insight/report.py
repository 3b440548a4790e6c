# pyright: strict, reportPrivateUsage=false
"""A cut in one file that opens anywhere: :func:`report` writes HTML without scripts, fonts or links; the same input gives the same bytes.

What lights up when it is pointed at (or reached with the tab key) is done by the style sheet alone, so that a page without JavaScript shows everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..coupling.groups import Groups
from ..cutting.describe import headline, whole_lines, widths_of
from ..cutting.outline import Outline
from ..cutting.plan import Plan, plan_of
from ..errors import BadPlan, GraphpruneError
from ..quantities import count, share
from ..tables import Table
from ..timing.measure import Measurement
from ..version import VERSION
from .axes import filed
from .chart import Chart, chart
from .sensitivity import Sensitivity
from .study import Study
from .svg import DARK, LIGHT, STYLE, chart_svg, highlight, histogram_svg, points_svg
from .tradeoff import AXES, Tradeoff

HISTOGRAMS = 48  # groups whose scores are drawn, those with most parameters first
ROWS = 160  # of a table

PAGE = (
    ":root{color-scheme:light dark}*{box-sizing:border-box}body{margin:0 auto;max-width:1180px;padding:16px 20px 60px;background:var(--paper);color:var(--ink);"
    "font:15px/1.5 system-ui,sans-serif}h1{font-size:24px;margin:8px 0}h2{font-size:18px;margin:34px 0 8px}p,li{max-width:80ch}small,.dim{color:var(--dim)}"
    ".scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px;padding:6px}table{border-collapse:collapse;font-size:13px;width:100%}"
    "th,td{padding:3px 9px;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}th{color:var(--dim);font-weight:600}"
    ".cards{display:flex;flex-wrap:wrap;gap:10px}"
    ".card{background:var(--panel);border-radius:8px;padding:10px 14px;min-width:150px}.card b{display:block;font-size:20px}"
    ".grid{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:204px}figcaption{font-size:12px;overflow-wrap:anywhere}a{color:var(--kept)}"
    "@media(max-width:640px){body{padding:12px 12px 40px}.card{min-width:46%;flex:1}.card b{font-size:17px}}"
    "td.heat{text-align:right}details{margin:8px 0}summary{cursor:pointer}nav{font-size:13px}code{font-size:13px}svg{max-width:none}"
)


def report(
    model: nn.Module,
    example_input: Any,
    plan: Plan | nn.Module | None = None,
    file: str | Path = "report.html",
    *,
    title: str = "",
    asked: Mapping[str, Any] | str = "",
    measurement: Measurement | None = None,
    sensitivity: Sensitivity | None = None,
    tradeoff: Tradeoff | None = None,
    score: Any = "l2",
    example_kwargs: dict[str, Any] | None = None,
) -> Path:
    """Write what was cut, what it saves, what stays whole and why, and how everything is coupled, into one HTML file; returns its path.

    - ``model`` is the original and ``plan`` what was done to it: a plan, or the small model that carries one; without it the model is shown uncut.
    - ``asked`` says what was asked for, in words or as options; ``measurement`` is what :func:`graphprune.measure` gave.
    - ``sensitivity`` and ``tradeoff`` add the results of those functions.
    - ``score`` gives the histograms: where units of a group lie, and where the cut ran. Scores that read data go as ``score.on(batches, loss)``.

    The file is complete or not there: it is written beside its place and moved. Raises :class:`~graphprune.errors.BadPlan` for a plan of another model.
    """
    if isinstance(plan, nn.Module):
        plan = plan_of(plan)
        if plan is None:
            raise BadPlan("the model given as plan carries none; pass the small model that graphprune.shrink returned, or its plan")
    study = Study(model, example_input, score, example_kwargs)
    if plan is not None:
        _belongs(plan, study.groups)
    outline = plan.outline if plan is not None else None
    drawing = chart(study.groups, outline)
    sections = [
        ("totals", "Totals", _totals(plan, study.groups, asked, measurement)),
        ("map", "How it is coupled", _map(drawing)),
        ("widths", "Widths", _widths(plan, study.groups)),
        ("whole", "What stays whole, and why", _wholes(plan, study.groups)),
        ("scores", "Scores, and where the cut runs", _histograms(study, plan)),
        ("sensitivity", "Which groups hurt", _sensitivity(sensitivity) if sensitivity else ""),
        ("tradeoff", "What a cut costs and saves", _tradeoff(tradeoff) if tradeoff else ""),
        ("notes", "Notes", _notes(plan)),
    ]
    title = title or f"{type(model).__name__}: what graphprune {'did' if plan is not None else 'sees'}"
    shown = [(key, name, body) for key, name, body in sections if body]
    links = " · ".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in shown)
    dark = f"@media(prefers-color-scheme:dark){{{DARK}}}"
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}'
        f"</title><style>{LIGHT}{dark}{STYLE}{PAGE}{highlight(drawing)}</style></head><body><h1>{escape(title)}</h1><nav>{links}</nav>"
        + "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{body}</section>' for key, name, body in shown)
        + f'<p class="dim">graphprune {escape(VERSION)}</p></body></html>\n'
    )
    path = Path(file)
    with filed(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _belongs(plan: Plan, groups: Groups) -> None:
    leaves = groups.graph.leaves
    for name, shape in plan.shapes.items():
        if name not in leaves:
            raise BadPlan(f"the plan cuts {name}, which this model does not have; give the original model that it was made for")
        if tuple(leaves[name].shape) != tuple(shape):
            raise BadPlan(
                f"the plan was made for {name} of shape {tuple(shape)}, this model's has {tuple(leaves[name].shape)}; give the original, not the cut model"
            )


def _card(name: str, value: str, note: str = "") -> str:
    return f'<div class="card">{escape(name)}<b>{escape(value)}</b><small>{escape(note)}</small></div>'


def _totals(plan: Plan | None, groups: Groups, asked: Mapping[str, Any] | str, measurement: Measurement | None) -> str:
    text = asked if isinstance(asked, str) else ", ".join(f"{name}={value!r}" for name, value in asked.items())
    cards = [_card("asked", text)] if text else []
    outline = plan.outline if plan else None
    if outline is not None:
        for name, before, after in zip(("parameters", "MACs"), outline.before, outline.after, strict=True):
            cards.append(_card(name, f"{count(before)} → {count(after)}", f"{share(after, before)} stay" if before else ""))
    else:
        params = sum(_volume(leaf.shape) for name, leaf in groups.graph.leaves.items() if name in groups.graph.parameters)
        cards += [_card("parameters", count(params)), _card("MACs", count(sum(node.macs for node in groups.graph.nodes)))]
        cards += [_card("change", headline(plan))] if plan is not None else []
    units = [(width.before, width.after) for width in widths_of(plan)] if plan else [(group.size, group.size) for group in groups]
    cards.append(_card("groups", f"{len(units)}", f"{sum(a for _, a in units):,} of {sum(b for b, _ in units):,} units stay"))
    if measurement is not None:
        cards.append(_card("measured", *_measured(measurement)))
    return f'<div class="cards">{"".join(cards)}</div>'


def _measured(measurement: Measurement) -> tuple[str, str]:
    """What a measurement found, beside the model before where it was measured as well, and how it was made."""
    facts = f"{1e3 * measurement.seconds:.3g} ms"
    note = f"{facts}, {measurement.runtime}, {measurement.threads} threads"
    if measurement.speedup and measurement.band:
        slower, (low, high) = measurement.speedup < 1, measurement.band
        facts = f"{1 / measurement.speedup:.2f}x slower" if slower else f"{measurement.speedup:.2f}x faster"
        facts += f" ({1 / high:.2f} to {1 / low:.2f})" if slower else f" ({low:.2f} to {high:.2f})"
    return facts, note


def _volume(shape: Sequence[int]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume


def _map(drawing: Chart) -> str:
    text = (
        "Rows are modules in the order of the run, equal ones as one (×N). Every vertical line is a group of units that go together: a filled ring makes them, "
        "a bar passes them on, an open ring sums over them. Point at a line or a row, or use the tab key, to light up all that is cut with it. "
        "Arcs at the left say who hands its output to whom; a square marks a module with an axis that stays whole (point at it for the reason)."
    )
    return f'<p>{text}</p><div class="scroll">{chart_svg(drawing)}</div>'


def _widths(plan: Plan | None, groups: Groups) -> str:
    table = plan.table() if plan is not None else groups.table()
    shown = Table(table.columns, table.rows[:ROWS], table.formats)
    rest = f"<p><small>{len(table) - ROWS} more: plan.table()</small></p>" if len(table) > ROWS else ""
    note = (
        ""
        if plan is None
        else "<p><small>params, macs: the share of the model's that lies along the units; a weight between two groups counts for both.</small></p>"
    )
    return f'{note}<details open><summary>{len(table)} rows</summary><div class="scroll">{shown._repr_html_()}</div>{rest}</details>'


def _wholes(plan: Plan | None, groups: Groups) -> str:
    if plan is not None and plan.outline is not None:
        lines = [line.removeprefix("whole: ") for line in whole_lines(plan)]
    else:
        lines = [line.removeprefix("whole: ") for line in str(groups).splitlines() if line.startswith("whole: ")]
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _histograms(study: Study, plan: Plan | None) -> str:
    try:
        scores = study.scores()
    except GraphpruneError as error:
        return f"<p>{escape(str(error))}</p>"
    outline: Outline | None = plan.outline if plan else None
    after = {width.name: width.after for width in outline.widths} if outline else {}
    weight = {width.name: width.params for width in outline.widths} if outline else {row["name"]: row["share"] for row in study.groups.table()}
    ranked = sorted(study.groups, key=lambda group: (-weight.get(group.name, 0.0), group.index))[:HISTOGRAMS]
    figures: list[str] = []
    for group in sorted(ranked, key=lambda group: group.index):
        values: list[float] = sorted(cast(Any, scores[group.index]).tolist())
        units = after.get(group.name, group.size)
        cut = values[group.size - units] if 0 < units < group.size else None
        figures.append(histogram_svg(values, cut, group.name, f"{units} of {group.size} stay" if units < group.size else f"{group.size} units"))
    rest = f"<p><small>The {HISTOGRAMS} of {len(study.groups)} groups with most parameters.</small></p>" if len(study.groups) > HISTOGRAMS else ""
    name = study.score if isinstance(study.score, str) else getattr(study.score, "name", "the score given")
    text = f"Score: {name}. Units left of the line go, where the group is cut by this score alone."
    return f'<p>{escape(text)}</p><div class="grid">{"".join(figures)}</div>{rest}'


def _sensitivity(study: Sensitivity) -> str:
    ratios = sorted({effect.ratio for effect in study.effects})
    grid: dict[str, dict[float, Any]] = {}
    for effect in study.effects:
        grid.setdefault(effect.group, {})[effect.ratio] = effect
    worst = max((study.original - effect.value for effect in study.effects), default=0.0) or 1.0
    rows: list[str] = []
    for group in [name for name in study.ranked() if name in grid][:ROWS]:
        cells: list[str] = []
        for ratio in ratios:
            effect = grid[group].get(ratio)
            heat = 0 if effect is None else round(70 * min(1.0, max(0.0, (study.original - effect.value) / worst)))
            style = f' style="background:color-mix(in srgb,var(--lock) {heat}%,transparent)"' if heat else ""
            cells.append(f'<td class="heat"{style}>{"" if effect is None else f"{effect.value:.4g}"}</td>')
        rows.append(f"<tr><td>{escape(group)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{ratio:.0%} removed</th>" for ratio in ratios)
    return f'<p>The original evaluates at {study.original:.6g}.</p><div class="scroll"><table><tr><th>group</th>{head}</tr>{"".join(rows)}</table></div>'


def _tradeoff(study: Tradeoff) -> str:
    drawings: list[str] = []
    for by, name in AXES.items():
        whole = getattr(study.points[0], by)
        if whole:
            front = set(map(id, study.front(by)))
            points = [
                (getattr(p, by) / whole, p.value, f"{p.asked:.0%} asked: {p.value:.4g}", id(p) in front) for p in study.points if getattr(p, by) is not None
            ]
            drawings.append(points_svg(points, name, "evaluate"))
    return f'<div class="grid">{"".join(drawings)}</div><div class="scroll">{study.table()._repr_html_()}</div>'


def _notes(plan: Plan | None) -> str:
    lines = [*(plan.remarks if plan else ()), *(plan.notes if plan else ())]
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines[:200])}</ul>" if lines else ""
