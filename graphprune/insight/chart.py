"""The coupling of a model as a drawing that can be read: :func:`chart`.

Modules with weights are rows, in the order of the run, repeated blocks folded into one; groups are lanes beside them, each a line with a mark in every
row where its units are made, passed on or summed over. Lanes that never meet share a column. Who hands its output to whom is drawn as arcs.
A :class:`Chart` is plain data: :mod:`graphprune.insight.svg` and :mod:`graphprune.insight.picture` draw it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..coupling.groups import Groups
from ..coupling.links import links
from ..cutting.outline import Outline, module_of
from ..tracing.trees import tensors
from ..wording import folded, pattern

MARKS = {"produces": "makes", "passes": "passes on", "consumes": "sums over"}
FEW, MOST = 24, 96  # modules that all get a row; rows that are looked at together


@dataclass(frozen=True)
class Row:
    """Modules drawn as one: their paths, the lane of the units that they make (-1: an axis that stays), widths before and after, parameters, locks."""

    label: str
    times: int
    paths: tuple[str, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    params: int
    locks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lane:
    """Groups drawn as one: how many, units before and after, and the marks (row, role) along the line; ``column`` is where the line stands."""

    label: str
    times: int
    groups: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    marks: tuple[tuple[int, str], ...]
    column: int = 0

    @property
    def span(self) -> tuple[int, int]:
        return self.marks[0][0], self.marks[-1][0]


@dataclass(frozen=True)
class Chart:
    """Rows, lanes, and arcs (from row, to row)."""

    rows: tuple[Row, ...]
    lanes: tuple[Lane, ...]
    arcs: tuple[tuple[int, int], ...]

    @property
    def columns(self) -> int:
        return 1 + max((lane.column for lane in self.lanes), default=-1)


def chart(groups: Groups, outline: Outline | None = None) -> Chart:
    """The chart of coupled groups; with the outline of a plan also the widths that are left and why axes are whole."""
    marks = _marks(groups)
    modules = _modules(groups)
    rows = _rows(_folds(modules, marks, groups), groups, outline)
    index = {path: number for number, row in enumerate(rows) for path in row.paths}
    return Chart(rows, _lanes(groups, marks, index, outline), _arcs(groups, index))


def _modules(groups: Groups) -> list[str]:
    """The modules whose tensors the run reads, in its order."""
    read = (module_of(value.leaf) for node in groups.graph.nodes for value in node.held if value.leaf and not value.leaf.startswith("<"))
    return list(dict.fromkeys(read))


def _marks(groups: Groups) -> dict[int, dict[str, str]]:
    """For every group, the role of every module where it has places; what makes units is said before what passes them on."""
    order = list(MARKS)
    marks: dict[int, dict[str, str]] = {}
    for index, group_links in enumerate(links(groups)):
        roles = marks.setdefault(index, {})
        for link in group_links:
            path = module_of(link.leaf)
            roles[path] = min(link.role, roles.get(path, link.role), key=order.index)
        for name, _ in groups.groups[index].places:
            if not name.startswith("<"):
                roles.setdefault(module_of(name), "passes")
    return marks


def _folds(modules: Sequence[str], marks: Mapping[int, Mapping[str, str]], groups: Groups) -> list[tuple[str, ...]]:
    """Rows as sets of modules: all of them if that is few enough, else what looks the same in every way, else layers of repeated blocks, of any size."""
    shapes: dict[str, list[tuple[Any, ...]]] = {path: [] for path in modules}
    for name, leaf in groups.graph.leaves.items():
        if name in groups.graph.parameters and module_of(name) in shapes:
            shapes[module_of(name)].append((name.rpartition(".")[2], tuple(leaf.shape)))
    if len(modules) > FEW:  # what only scales and shifts needs no row of its own
        modules = [path for path in modules if any(len(shape) > 1 for _, shape in shapes[path])] or list(modules)
    crossings = _crossings(modules, marks, groups)
    exact = {path: (_block(path, 1), tuple(shapes[path]), crossings[path]) for path in modules}
    counts: dict[str, set[str]] = {}
    for path in modules:
        counts.setdefault(pattern(_prefix(path)), set()).add(_prefix(path))
    long = {path: _block(path, 1) if len(counts[pattern(_prefix(path))]) > 3 else path for path in modules}
    for key in (exact, long, {path: _block(path, 1) for path in modules}):
        rows = _together(modules, key)
        if len(rows) <= MOST:
            return rows
    return _together(modules, {path: _block(path, 99) for path in modules})


def _crossings(modules: Sequence[str], marks: Mapping[int, Mapping[str, str]], groups: Groups) -> dict[str, tuple[Any, ...]]:
    """The groups that meet each module, in which role and of what size; a group inside a block is named by the block's kind."""
    lanes: dict[str, list[tuple[Any, ...]]] = {path: [] for path in modules}
    for index, roles in marks.items():
        group = groups.groups[index]
        inside = len({_prefix(path) for path in roles}) == 1  # every block has such a group of its own
        for path, role in roles.items():
            if path in lanes:
                lanes[path].append((role, _block(group.name.rpartition(".")[0], 1) if inside else index, group.size))
    return {path: tuple(sorted(crossing, key=str)) for path, crossing in lanes.items()}


def _block(path: str, most: int) -> str:
    """The path with the last ``most`` of its numbers left out, but for what the layer itself is called.

    >>> _block("layer1.0.conv2", 1), _block("layer1.0.conv2", 2), _block("downsample.0", 1)
    ('layer1.#.conv2', 'layer#.#.conv2', 'downsample.0')
    """
    *parts, layer = path.split(".")
    for at in range(len(parts) - 1, -1, -1):
        if most and any(letter.isdigit() for letter in parts[at]):
            parts[at], most = pattern(parts[at]), most - 1
    return ".".join([*parts, layer])


def _prefix(path: str) -> str:
    """The block that a layer is in: the path up to its last number, but for the layer's own.

    >>> _prefix("layer1.0.downsample.0"), _prefix("stem.conv")
    ('layer1.0', '')
    """
    parts = path.split(".")[:-1]
    while parts and not any(letter.isdigit() for letter in parts[-1]):
        parts.pop()
    return ".".join(parts)


def _together(modules: Sequence[str], key: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: dict[Any, list[str]] = {}
    for path in modules:
        rows.setdefault(key[path], []).append(path)
    return [tuple(paths) for paths in rows.values()]


def _rows(paths: Sequence[tuple[str, ...]], groups: Groups, outline: Outline | None) -> tuple[Row, ...]:
    graph = groups.graph
    after = {(w.name, w.axis): w.after / w.before for w in outline.widths} if outline else {}
    share = {place: after.get((g.name, next(iter(g.places))[1]), 1.0) for g in groups for place in g.places}
    locks: dict[str, list[str]] = {}
    for (name, axis), reason in groups.locked.items():
        if not (axis > 1 and "conv" in reason.op):
            locks.setdefault(module_of(name), []).append(f"{name.rpartition('.')[2]} axis {axis}: {reason}")
    made = []
    for fold in paths:
        before, after_cut, params = [], [], 0
        for path in fold:
            inside = [(name, leaf) for name, leaf in graph.leaves.items() if name in graph.parameters and module_of(name) == path]
            params += sum(math.prod(leaf.shape) for _, leaf in inside)
            main = max(inside, key=lambda item: (len(item[1].shape), math.prod(item[1].shape)), default=None)
            if main and main[1].shape:
                before.append(main[1].shape[0])
                after_cut.append(round(main[1].shape[0] * share.get((main[0], 0), 1.0)))
        sentences = dict.fromkeys(sentence for path in fold for sentence in locks.get(path, ()))
        made.append(Row(folded(fold, 2), len(fold), tuple(fold), tuple(before), tuple(after_cut), params, tuple(sentences)))
    return tuple(made)


def _lanes(groups: Groups, marks: Mapping[int, Mapping[str, str]], index: Mapping[str, int], outline: Outline | None) -> tuple[Lane, ...]:
    """Groups with the same marks are one lane; lanes take the first column that is free over their span."""
    order = list(MARKS)
    alike: dict[tuple[tuple[int, str], ...], list[int]] = {}
    for group, roles in marks.items():
        best: dict[int, str] = {}
        for path, role in roles.items():
            if path in index:
                best[index[path]] = min(role, best.get(index[path], role), key=order.index)
        if best:
            alike.setdefault(tuple(sorted(best.items())), []).append(group)
    widths = {width.name: width.after for width in outline.widths} if outline else {}
    lanes = []
    for marked, members in alike.items():
        alike_groups = [groups.groups[index] for index in members]
        before = tuple(group.size for group in alike_groups)
        after = tuple(widths.get(group.name, group.size) for group in alike_groups)
        label = folded([module_of(group.name) for group in alike_groups], 2)
        lanes.append(Lane(label, len(members), tuple(members), before, after, marked))
    busy: list[int] = []  # the last row of each column
    placed = []
    for lane in sorted(lanes, key=lambda lane: (lane.span[0], -lane.span[1], lane.groups)):
        column = next((c for c, last in enumerate(busy) if last < lane.span[0]), len(busy))
        busy[column:] = [lane.span[1], *busy[column + 1 :]]
        placed.append(replace(lane, column=column))
    return tuple(placed)


def _arcs(groups: Groups, index: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
    """From which rows every row takes what it works on. Where streams join (a sum, a concatenation), the others lead to the row that ran last,
    which then stands for all of them."""
    origin: dict[int, int] = {}
    arcs: dict[tuple[int, int], None] = {}
    ran: dict[int, int] = {}
    for moment, node in enumerate(groups.graph.nodes):
        sources = {origin[id(value)] for value in node.held if id(value) in origin}
        rows = [index[module_of(v.leaf)] for v in node.held if v.leaf and not v.leaf.startswith("<") and module_of(v.leaf) in index]
        if not rows and not sources:
            continue
        row = rows[0] if rows else max(sources, key=lambda source: ran[source])
        if rows:
            ran[row] = moment
        arcs |= {(source, row): None for source in sorted(sources) if source != row}
        for out in tensors(node.outs):
            origin[id(out)] = row
    return tuple(arcs)


def spread(values: Sequence[int]) -> str:
    """
    >>> spread((64, 64)), spread((64, 256)), spread(())
    ('64', '64–256', '')
    """
    return "" if not values else str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"
