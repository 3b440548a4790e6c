"""A plan in words: what :meth:`Plan.explain <graphprune.cutting.plan.Plan.explain>`, ``print(plan)``, :meth:`Plan.table` and :meth:`Plan.compare` say.

Everything here reads a plan's fields and writes text or a :class:`~graphprune.tables.Table`; nothing needs the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UnknownName
from ..quantities import count, share
from ..tables import Table, aligned
from ..wording import counted, folded, nearest, pattern, several
from .outline import Outline, Totals, Whole, Width, cut_shape, module_of
from .parts import GONE, Part, survivors

if TYPE_CHECKING:
    from .plan import Plan

ROWS, WHOLES, NOTES = 30, 8, 6  # what fits a screen
UNREPAIRED = "not repaired: {with_inputs} (inputs, no labels) refits what stays to what was removed, {without} does what it can without"
CHANGES = {"skip": "removed", "expert": "removed", "mask": "masked", "kernel": "smaller kernel", "columns": "thinner product"}


class Hints(NamedTuple):
    """How what a printed plan advises is spelled: where to give inputs for a repair, how to repair without, and where more is said."""

    with_inputs: str
    without: str
    more: str


PYTHON = Hints("repair=batches", 'repair="data-free"', "plan.explain(), plan.explain(verbose=True), plan.table(), plan.kept(module), plan.compare(other)")


def headline(plan: Plan) -> str:
    """The totals, in a line.

    >>> headline_of(Totals(1000, 5_000_000), Totals(500, 1_200_000))
    'parameters 1.00 k -> 500 (50 %), MACs 5.00 M -> 1.20 M (24 %)'
    """
    if plan.outline is not None:
        return headline_of(plan.outline.before, plan.outline.after)
    if plan.cuts:
        return f"{counted(len(plan.cuts), 'tensor')} cut"
    weights = [(math.prod(plan.shapes[part.name]), _entries(plan, part)) for part in plan.parts if part.kind not in GONE]
    staying = [staying for _, staying in weights if staying is not None]
    if staying and len(staying) == len(weights):
        total = sum(whole for whole, _ in weights)
        return f"{count(sum(staying))} of {count(total)} weights stay in {counted(len(weights), 'tensor')} ({share(sum(staying), total)})"
    return counted(len(plan.parts), "change") if plan.parts else "nothing is cut"


def headline_of(before: Totals, after: Totals) -> str:
    pairs = [("parameters", before.params, after.params), ("MACs", before.macs, after.macs)]
    return ", ".join(f"{name} {count(old)} -> {count(new)}{f' ({share(new, old)})' if old else ''}" for name, old, new in pairs)


def brief_text(plan: Plan, hints: Hints = PYTHON) -> str:
    """What fits a screen: totals, the groups (repeated blocks folded), what stays whole and why, notes."""
    lines = [f"Plan: {headline(plan)}"]
    if plan.outline is not None and plan.outline.widths:
        lines += ["", *_width_lines(plan.outline.widths, ROWS)]
    if plan.parts:
        lines += ["", *_part_lines(plan, ROWS)]
    wholes = list(whole_lines(plan))
    if wholes:
        lines += ["", *wholes[:WHOLES], *([f"… and {counted(len(wholes) - WHOLES, 'more reason')}"] if len(wholes) > WHOLES else [])]
    extra = [*plan.remarks, *plan.notes]
    if extra:
        lines += ["", *(_cut(line) for line in extra[-NOTES:])]
        lines += [f"… and {counted(len(extra) - NOTES, 'more line')}"] if len(extra) > NOTES else []
    if (plan.cuts or plan.parts) and not any(line.startswith("repair") for line in plan.lines):
        lines += ["", UNREPAIRED.format(with_inputs=hints.with_inputs, without=hints.without)]
    if len(lines) > 1:
        lines += ["", f"more: {hints.more}"]
    return "\n".join(lines)


def _cut(line: str, most: int = 240) -> str:
    return line if len(line) <= most else line[: most - 1] + "…"


def _width_lines(widths: Sequence[Width], most: int) -> list[str]:
    folds: dict[tuple[Any, ...], list[Width]] = {}
    for width in widths:
        folds.setdefault((pattern(width.where), width.before, width.after), []).append(width)
    ranked = sorted(folds.items(), key=lambda item: -sum(w.params for w in item[1]))[:most]
    shown = [(key, fold) for key, fold in folds.items() if (key, fold) in ranked] if len(folds) > most else list(folds.items())
    head = ("group", "", "units", "", "left", "share", "of parameters", "of MACs")
    rows = []
    for (_, before, after), fold in shown:
        where = folded(
            [maker for width in fold for maker in width.makers or [module_of(width.name)]] if len(fold) > 1 else fold[0].makers or [module_of(fold[0].name)], 2
        )
        times = f"x{len(fold)}" if len(fold) > 1 else ""
        params, macs = (f"{100 * min(1.0, sum(each)):.1f} %" for each in ([w.params for w in fold], [w.macs for w in fold]))
        rows.append((where if len(where) <= 70 else where[:69] + "…", times, str(before), "->", str(after), share(after, before), params, macs))
    lines = aligned(head, rows, (False, True, True, False, True, True, True, True)).split("\n")
    hidden = len(widths) - sum(len(fold) for _, fold in shown)
    return [*lines, f"… and {counted(hidden, 'smaller group')}: plan.table()"] if hidden else lines


def _part_lines(plan: Plan, most: int) -> list[str]:
    table = parts_table(plan)
    lines = str(Table(table.columns, table.rows[:most], table.formats)).split("\n")
    return [*lines, f"… and {len(table) - most} more: plan.table()"] if len(table) > most else lines


def explain_text(plan: Plan, verbose: bool) -> str:
    """Totals, one line a group, axes that stay whole by their reason, then notes; ``verbose`` lists every tensor and every axis."""
    lines = [headline(plan)]
    if plan.outline is None:
        lines += [f"{name} axis {axis}: {plan.shapes[name][axis]} -> {len(kept)}" for name, axes in plan.cuts.items() for axis, kept in sorted(axes.items())]
    elif verbose:
        lines += _every_tensor(plan, plan.outline)
    else:
        lines += [_width_line(index, width) for index, width in enumerate(plan.outline.widths)]
        lines += whole_lines(plan)
    return "\n".join((*lines, *plan.remarks, *plan.notes))


def _width_line(index: int, width: Width) -> str:
    parts = f"{counted(1 + len(width.places), 'place')}; {100 * width.params:.1f} % of the parameters, {100 * width.macs:.1f} % of the MACs lie along it"
    return f"group {index} ({width.name} axis {width.axis}): {width.before} -> {width.after} units in {width.where}; {parts}"


def every_line(plan: Plan) -> Iterator[str]:
    """A line for each group, each axis that stays whole, and each remark."""
    if plan.outline is not None:
        yield from (line for line in _every_tensor(plan, plan.outline) if line[0] != " ")
    yield from plan.remarks


def _every_tensor(plan: Plan, outline: Outline) -> Iterator[str]:
    for index, width in enumerate(outline.widths):
        yield f"group {index} ({width.name}): {width.after} of {width.before} units stay"
        for name, axis in ((width.name, width.axis), *width.places):
            before = (plan.shapes.get(name) or outline.shape(name))[axis]
            yield f"  {name} axis {axis}: {before} -> {len(plan.cuts.get(name, {}).get(axis, range(before)))}"
    for whole in outline.wholes:
        yield f"whole: {whole.name} axis {whole.axis} ({whole.entries} entries): {whole.reason}"


def whole_lines(plan: Plan) -> Iterator[str]:
    """A line for each reason why axes stay whole, those that hold most parameters first; heights and widths of kernels are only counted."""
    outline = plan.outline
    if outline is None:
        return
    reasons: dict[tuple[str, str], list[Whole]] = {}
    for whole in outline.wholes:
        if not whole.kernel:
            reasons.setdefault((whole.text, whole.op), []).append(whole)
    costs = {
        key: sum(math.prod(outline.shapes[name]) for name in {whole.name for whole in places} if name in outline.shapes) for key, places in reasons.items()
    }
    for key, places in sorted(reasons.items(), key=lambda item: -costs[item[0]]):
        text = f"{key[0]} ({key[1]})" if key[1] else key[0]
        weights = [whole for whole in places if len(outline.shape(whole.name)) > 1] or places
        where = folded([f"{whole.name} axis {whole.axis}" for whole in weights])
        part = f"{count(costs[key])} parameters ({share(costs[key], outline.before.params) or '0 %'})"
        yield f"whole: {text}: {counted(len(places), 'axis', 'axes')}, {part}: {where}"
    kernels = sum(whole.kernel for whole in outline.wholes)
    if kernels:
        yield f"({counted(kernels, 'height or width', 'heights and widths')} of kernels stay, as they do: explain(verbose=True) lists them)"


def table_of(plan: Plan, by: str) -> Table:
    """One row for every group, every tensor, or every change beyond cutting axes."""
    if by not in ("groups", "tensors", "changes"):
        raise UnknownName(f"no table by {by!r}; there are 'groups', 'tensors' and 'changes'")
    if by == "changes" or (by == "groups" and plan.parts and not (plan.outline and plan.outline.widths)):
        return parts_table(plan)
    return groups_table(plan) if by == "groups" else tensors_table(plan)


PERCENT = {name: lambda value: f"{100 * value:.1f} %" for name in ("kept", "params", "macs", "change")}


def groups_table(plan: Plan) -> Table:
    columns = ("group", "axis", "where", "before", "after", "kept", "params", "macs", "places")
    rows = [(w.name, w.axis, w.where, w.before, w.after, w.after / w.before, w.params, w.macs, 1 + len(w.places)) for w in widths_of(plan)]
    return Table(columns, tuple(rows), PERCENT)


def widths_of(plan: Plan) -> Sequence[Width]:
    """The groups' widths; of a plan without an outline, one for each axis that is cut."""
    if plan.outline is not None:
        return plan.outline.widths
    return [Width(name, axis, plan.shapes[name][axis], len(kept), 0.0, 0.0, ()) for name, axes in plan.cuts.items() for axis, kept in sorted(axes.items())]


def tensors_table(plan: Plan) -> Table:
    shapes = {**plan.outline.shapes, **plan.outline.buffers} if plan.outline else {}
    shapes |= {name: shape for name, shape in plan.shapes.items() if name not in shapes}
    why: dict[str, list[str]] = {}
    for whole in plan.outline.wholes if plan.outline else ():
        if not whole.kernel:
            why.setdefault(whole.name, []).append(f"axis {whole.axis}: {whole.reason}")
    rows = []
    for name, shape in shapes.items():
        after = cut_shape(shape, plan.cuts.get(name, {}))
        kept = math.prod(after) / math.prod(shape) if math.prod(shape) else 1.0
        rows.append((name, "x".join(map(str, shape)), "x".join(map(str, after)), kept, "; ".join(why.get(name, []))))
    return Table(("tensor", "before", "after", "kept", "whole"), tuple(rows), PERCENT)


def parts_table(plan: Plan) -> Table:
    rows = []
    for part in plan.parts:
        if part.kind in GONE:
            inside = [shape for name, shape in (plan.outline.shapes if plan.outline else {}).items() if name.startswith(f"{part.name}.")]
            rows.append((part.name, CHANGES[part.kind], sum(map(math.prod, inside)) if inside else None, 0, 0.0))
            continue
        whole, after = math.prod(plan.shapes[part.name]), _entries(plan, part)
        rows.append((part.name, CHANGES[part.kind], whole, after, None if after is None else after / whole))
    return Table(("name", "what", "before", "after", "kept"), tuple(rows), PERCENT)


def compared(one: Plan, other: Plan) -> Table:
    """Where two plans of one model differ; raises UnknownName when they share no tensor."""
    names, others = ({**(plan.outline.shapes if plan.outline else {}), **plan.shapes} for plan in (one, other))
    if names and others and not names.keys() & others.keys():
        raise UnknownName(f"the plans share no tensor ({several(sorted(names))} against {several(sorted(others))}): they are of two models")
    rows = [*_width_rows(one, other), *_part_rows(one, other)]
    columns = ("what", "before", "this", "other", "change", "same positions")
    return Table(columns, tuple([*_total_rows(one, other), *rows] if rows else ()), {"change": lambda value: f"{100 * value:+.1f} %"})


def _total_rows(one: Plan, other: Plan) -> Iterator[tuple[Any, ...]]:
    if one.outline and other.outline:
        for name, before, here, there in zip(("parameters", "MACs"), one.outline.before, one.outline.after, other.outline.after, strict=True):
            yield f"all {name}", before, here, there, there / here - 1 if here else None, None


def _width_rows(one: Plan, other: Plan) -> Iterator[tuple[Any, ...]]:
    """The groups that two plans cut to other widths, or to other positions."""
    first, second = ({(width.name, width.axis): width for width in widths_of(plan)} for plan in (one, other))
    for name, axis in dict.fromkeys((*first, *second)):
        width, rival = first.get((name, axis)), second.get((name, axis))
        before = next(each.before for each in (width, rival) if each is not None)
        here, there = (each.after if each else before for each in (width, rival))
        kept, others = (plan.cuts.get(name, {}).get(axis) for plan in (one, other))
        if here != there or kept != others:
            same = len(set(kept) & set(others)) if kept is not None and others is not None else len(kept or others or ())
            yield f"{name} axis {axis}", before, here, there, there / here - 1, same


def _part_rows(one: Plan, other: Plan) -> Iterator[tuple[Any, ...]]:
    """The weights that two plans mask or make smaller in other ways, and the modules that only one of them removes."""
    for kind in CHANGES:
        here, there = ({part.name: part for part in plan.parts if part.kind == kind} for plan in (one, other))
        for name in dict.fromkeys((*here, *there)):
            if here.get(name) != there.get(name):
                sizes = [None if name not in parts else _entries(plan, parts[name]) for plan, parts in ((one, here), (other, there))]
                yield f"{name} {CHANGES[kind]}", None, *sizes, None, None


def _entries(plan: Plan, part: Part) -> int | None:
    """How many entries of a weight a part leaves; None where that is not said here (a mask that is stored with the weights)."""
    if part.kind in GONE:
        return 0
    mask = survivors(part, plan.shapes[part.name]) if part.data is not None else None
    return None if mask is None else int(mask.sum())


def kept_positions(plan: Plan, name: str, axis: int) -> list[int]:
    """The positions of the original that stay along an axis of a tensor, or of a module's weight."""
    shapes = {**(plan.outline.buffers if plan.outline else {}), **(plan.outline.shapes if plan.outline else {}), **plan.shapes}
    inside = [tensor for tensor in shapes if module_of(tensor) == name]
    tensor = name if name in shapes else next((t for t in (f"{name}.weight", *inside) if t in shapes), None)
    if tensor is None:
        known = [*dict.fromkeys(map(module_of, shapes)), *shapes]
        near, word = nearest(name, known), "the nearest are"
        near, word = (near, word) if near else (known, "there are")
        raise UnknownName(f"{name!r} is no tensor of this plan, and no module that has one; {word} {several(near)}")
    if not isinstance(axis, int) or isinstance(axis, bool) or not -len(shapes[tensor]) <= axis < len(shapes[tensor]):
        raise UnknownName(f"{tensor} has {counted(len(shapes[tensor]), 'axis', 'axes')} (shape {tuple(shapes[tensor])}), axis {axis!r} was asked for")
    axis %= len(shapes[tensor])
    return list(plan.cuts.get(tensor, {}).get(axis, range(shapes[tensor][axis])))


def html_text(plan: Plan) -> str:
    """The totals and the table of groups, for notebooks."""
    wholes = "".join(f"<li>{escape(line.removeprefix('whole: '))}</li>" for line in whole_lines(plan))
    return f"<p>{escape(headline(plan))}</p>{table_of(plan, 'groups')._repr_html_()}" + (f"<ul>{wholes}</ul>" if wholes else "")
