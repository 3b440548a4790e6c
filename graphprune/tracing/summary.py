"""A graph on one screen: :func:`summary` lists modules in the order of the run, as deep as fits, repeated ones folded.

It reads nodes and leaves only, so that it can stand below :class:`~graphprune.tracing.trace.Graph`, which prints with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..operations.notation import Value
from ..quantities import count
from ..tables import aligned
from ..wording import counted, folded, pattern, several

if TYPE_CHECKING:
    from .graph import Graph

ROWS = 40  # what fits a screen


class _Part(NamedTuple):
    """What lies under one path."""

    path: str
    calls: int
    params: int
    shape: str


MORE = "more: graph.nodes (calls), graph.leaves (tensors), graph.to_networkx()"


def summary(graph: Graph, more: str = MORE) -> str:
    """Totals in a line, then a table of modules with their calls, parameters and the shape of what they return."""
    volumes = {name: math.prod(leaf.shape) for name, leaf in graph.leaves.items() if name in graph.parameters}
    modules = len({node.module for node in graph.nodes})
    head = f"Graph: {counted(len(graph.nodes), 'call')} in {counted(modules, 'module')}, {count(sum(volumes.values()))} parameters in {len(volumes)} tensors"
    ends = f"{several([_shape(value) for value in graph.inputs])} -> {several([_shape(value) for value in graph.outputs])}"
    best: list[tuple[str, ...]] = []
    for depth in range(1, 12):
        rows = _rows(_parts(graph, volumes, depth))
        if best and (len(rows) > ROWS or rows == best):
            break
        best = rows
    shown = [*best[: ROWS - 1], ("…", f"{len(best) - ROWS + 1} more", "", "", "")] if len(best) > ROWS else best
    table = aligned(("module", "", "calls", "parameters", "returns"), shown, (False, True, True, True, False))
    return "\n\n".join([f"{head}; {ends}", table, *([more] if more else [])])


def _shape(value: Value) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _parts(graph: Graph, volumes: dict[str, int], depth: int) -> list[_Part]:
    calls: dict[str, int] = {}
    params: dict[str, int] = {}
    shapes: dict[str, str] = {}
    for node in graph.nodes:
        path = ".".join(node.module.split(".")[:depth])
        calls[path] = calls.get(path, 0) + 1
        if node.outs:
            shapes[path] = _shape(node.outs[0])
    for name, volume in volumes.items():
        path = ".".join(name.rpartition(".")[0].split(".")[:depth])
        params[path] = params.get(path, 0) + volume
    return [_Part(path, calls.get(path, 0), params.get(path, 0), shapes.get(path, "")) for path in dict.fromkeys((*calls, *params))]


def _rows(parts: Sequence[_Part]) -> list[tuple[str, ...]]:
    folds: dict[tuple[Any, ...], list[_Part]] = {}
    for part in parts:
        folds.setdefault((pattern(part.path), *part[1:]), []).append(part)
    return [
        (folded([part.path for part in fold]) or "(the model itself)", f"x{len(fold)}" if len(fold) > 1 else "", str(calls), count(params), shape)
        for (_, calls, params, shape), fold in folds.items()
    ]
