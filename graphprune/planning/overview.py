"""What can go from a model, before anything is asked: :func:`widths` is a table of its kinds of unit, one row for all layers that are alike."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..catalogue import names
from ..cost import costs
from ..coupling.groups import Group, Groups, couple
from ..cutting.verify import check_model
from ..granularity.blocks import Modules
from ..granularity.heads import of_one_key
from ..granularity.remaining import Remaining
from ..granularity.spec import parse
from ..names import Makers
from ..quantities import count
from ..tracing.graph import Graph
from ..tracing.members import LISTED
from ..tracing.trace import trace
from .listed import coupled, mixtures_of, unit_costs
from .units import kind, roles

SHOWN = 6  # rows of what stays whole


@dataclass(frozen=True)
class Row:
    """Groups (or blocks) of one kind that are alike: ``count`` of them, each ``size`` units wide.

    ``outputs``: positions that one unit has in the outputs of ``where`` (a head has several). ``params`` and ``macs``: what one unit costs in one of them, all
    that goes with it included. ``why`` is empty where units can go, and says else what holds them (``size`` is then the length of the axis).
    """

    kind: str
    where: str
    count: int
    size: int
    outputs: float
    params: float
    macs: float
    why: str = ""


@dataclass(frozen=True)
class Overview:
    """The rows of :func:`widths`; ``print`` shows a table, ``overview["mlp"]`` the rows of one kind."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind and not row.why]

    def __str__(self) -> str:
        head = ("kind", "where", "of them", "units", "outputs each", "parameters each", "MACs each")
        free = [row for row in self.rows if not row.why]
        table = [head, *((r.kind, r.where, str(r.count), str(r.size), f"{r.outputs:g}", count(r.params), count(r.macs)) for r in free)]
        lines = _aligned(table, texts=2)
        whole = [row for row in self.rows if row.why]
        if whole:
            lines += ["", f"stays whole ({len(whole)} kinds of axes{', the largest' if len(whole) > SHOWN else ''}):"]
            lines += _aligned([(row.where, f"{row.count} x {row.size}", row.why) for row in whole[:SHOWN]], texts=3)
        return "\n".join(lines)


def _aligned(table: list[tuple[str, ...]], texts: int) -> list[str]:
    wide = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    sides = [str.ljust if column < texts else str.rjust for column in range(len(wide))]
    return ["  ".join(side(text, w) for side, text, w in zip(sides, row, wide, strict=True)).rstrip() for row in table]


def widths(model: nn.Module, example_input: Any, *, example_kwargs: dict[str, Any] | None = None) -> Overview:
    """The kinds of unit of a model: what each is called in ``what=``, where it stands, how wide it is, what a unit costs; and what stays whole, and why.

    Raises :class:`~graphprune.errors.BadInput` or :class:`~graphprune.errors.BadModel`.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(row.kind, row.where, row.size, row.params) for row in widths(net, torch.zeros(1, 4)) if not row.why]
    [('mlp', '0', 8, 7.0)]
    """
    check_model(model)
    graph = trace(model, example_input, example_kwargs)
    groups = couple(graph)
    return Overview((*_blocks(graph, model), *_groups(groups, model), *_listed(graph, model), *_by_themselves(groups, model), *_whole(groups)))


def alike(name: str) -> str:
    """A name with numbers left open: layers of one kind have one.

    >>> alike("model.layers.11.mlp")
    'model.layers.*.mlp'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _by_themselves(every: Groups, model: nn.Module) -> list[Row]:
    """The kinds that have a plan of their own: queries within their group, and what lies inside of heads."""
    graph = every.graph
    rows: list[Row] = []
    shared = bool(graph.labels.repeated or of_one_key(every))
    for name in names("granularity"):
        found = kind(name)
        spec = parse(name) if found is not None else None
        if found is None or spec is None or not spec.alone or (spec.apart and not shared):
            continue
        other = trace(model, *graph.example, apart=True) if spec.apart else graph
        groups = spec.coupled(other) if spec.coupled else couple(other, locks=tuple(spec.locks(other)) if spec.locks else ())
        rows += _groups(groups, model, dict.fromkeys(found.groups(groups), name))
    return rows


def _listed(graph: Graph, model: nn.Module) -> list[Row]:
    """Experts that are modules of lists."""
    if not graph.mixtures:
        return []
    groups = coupled(graph)
    same: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for index, mixtures in mixtures_of(groups).items():
        same[alike(mixtures[0].lists[0]), mixtures[0].choices[0].labels.size, len(mixtures[0].lists)].append(index)
    return [Row("experts", where, len(members), size, 1.0, *unit_costs(groups, model, members[0])) for (where, size, _), members in same.items()]


def _groups(groups: Groups, model: nn.Module, kinds: Mapping[int, str] | None = None) -> list[Row]:
    """One row for groups of one kind, name and size (of those in ``kinds``, or all); each costs what the first of them does."""
    makers, kinds = Makers(groups, model), roles(groups) if kinds is None else kinds
    same: dict[tuple[str, str, int], list[Group]] = defaultdict(list)
    for group in groups:
        if group.index not in kinds:
            continue
        where = next((leaf for leaf in dict.fromkeys(name for name, _ in group.places) if leaf in makers.made[group.index]), group.name)
        same[kinds[group.index], alike(where.rpartition(".")[0] or where), group.size].append(group)
    each = _each([members[0] for members in same.values()], groups)
    rows: list[Row] = []
    for (role, where, size), members in same.items():
        one = members[0]
        units_made = [units for (leaf, _), units in one.places.items() if leaf in makers.made[one.index]]
        outputs = max((int((np.asarray(units) >= 0).sum()) / size for units in units_made), default=1.0)
        only = where if len(members) > 1 else (next(iter(makers.made[one.index]), one.name).rpartition(".")[0] if len(makers.made[one.index]) == 1 else where)
        rows.append(Row(role, only or where, len(members), size, outputs, *each[one.index]))
    return sorted(rows, key=lambda row: -row.params * row.size * row.count)


def _each(chosen: list[Group], groups: Groups) -> Mapping[int, tuple[float, float]]:
    """Parameters and MACs that go with one unit of each group, all others whole."""
    if not chosen:
        return {}
    full = np.array([[float(group.size) for group in groups]])
    known = costs(groups)
    before = known.at(full, ["params", "macs"])
    amounts: dict[int, tuple[float, float]] = {}
    for group in chosen:
        less = np.copy(full)
        less[0, group.index] -= 1
        after = known.at(less, ["params", "macs"])
        amounts[group.index] = (float(before["params"][0] - after["params"][0]), float(before["macs"][0] - after["macs"][0]))
    return amounts


def _blocks(graph: Graph, model: nn.Module) -> list[Row]:
    """Whole residual blocks, one row for those of one name and cost."""
    modules = Modules(graph, model)
    lists = {path for mixture in graph.mixtures for path in mixture.lists}  # what is chosen from these is no layer: they are experts
    every = [one for one in modules.blocks() if not any(one.name.startswith(f"{path}.") for path in lists)]
    remaining = Remaining(graph, model, modules)
    full = dict(remaining.costs)
    same: dict[tuple[str, float, float], int] = defaultdict(int)
    for one in every:
        remaining.remove(one)
        same[alike(one.name), full["params"] - remaining.costs["params"], full["macs"] - remaining.costs["macs"]] += 1
        remaining.restore(one)
    return [Row("layers", where, 1, number, 1.0, params, macs) for (where, params, macs), number in same.items()]


def _whole(groups: Groups) -> list[Row]:
    """The axes that stay whole, one row for those of one name, length and reason, the largest tensors first."""
    same: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for (name, axis), reason in groups.locked.items():
        leaf = groups.graph.leaves[name]
        if len(leaf.shape) > 1 and not name.startswith("<") and reason.text != LISTED:
            same[f"{alike(name)} axis {axis}", leaf.shape[axis], str(reason)].append(int(np.prod(leaf.shape)))
    rows = sorted(same.items(), key=lambda item: -sum(item[1]))
    return [Row("", where, len(sizes), size, 1.0, 0.0, 0.0, reason) for (where, size, reason), sizes in rows]
