"""Integers of modules that the run did not read, where they say the length of an axis that is cut: :func:`unread_sizes` follows them, or says so.

Another method, or a flag of an exporter, may read them (``x.split((self.c, self.c), 1)`` where the run had ``x.chunk(2, 1)``). One is followed where all
code of its class that reads it gives it to calls that take sizes, and where the axes of that length which the module itself works on all get the
same new one; else a note says that it still says what was.

>>> reads_as_size(nn.Flatten, "start_dim")
False
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..coupling.groups import Groups
from ..cutting.plan import Survivors
from ..operations.labels import Array
from ..operations.notation import Value
from ..select import Kept
from ..tracing.foreign import foreign
from ..tracing.graph import Graph
from ..tracing.needs import sized
from ..tracing.sizes import leaves
from ..wording import folded

PARTS = frozenset(("split", "chunk", "split_with_sizes", "tensor_split", "narrow", "__getitem__"))  # calls of the Python code that take parts of an axis
Lengths = dict[str, dict[int, set[int]]]  # by module: what became of the axes of some length
_READS: WeakKeyDictionary[type, dict[str, tuple[bool, frozenset[str]]]] = WeakKeyDictionary()


def unread_sizes(graph: Graph, model: nn.Module, groups: Groups, kept: Kept) -> tuple[dict[tuple, int], list[str]]:
    """New values of attributes that no run read, and notes on them and on those that could not be followed."""
    used = set(_used(graph))
    unread = [(path, value) for path, value in graph.symbols.items() if len(path) == 2 and path not in used]
    if not unread:
        return {}, []
    axes = _Axes(groups, kept, unread)
    results, parts, inside = axes.of_results(), axes.of_results(parts=True), axes.of_tensors()
    edits: dict[tuple, int] = {}
    stale: list[str] = []
    for path, value in unread:
        name, key = path
        news = inside[name].get(value, set()) | results[name].get(value, set())
        if news <= {value}:  # there is no such axis, or none of them is cut
            continue
        known, calls = reading(type(model.get_submodule(name)), key)
        sources = [parts] if calls & PARTS else []
        one = next((lengths for lengths_of in (*sources, results, inside) if (lengths := lengths_of[name].get(value))), set())
        if known and len(one) == 1:
            edits[path] = next(iter(one))
        else:
            stale.append(f"{'.'.join(part for part in path if part)} = {value}")
    notes = [f"note: no run read them, they follow their axes: {folded(['.'.join(filter(None, path)) for path in edits])}"] if edits else []
    notes += [f"note: no run read them, they still say what an axis was: {folded(stale)}"] if stale else []
    return edits, notes


def narrower(graph: Graph, groups: Groups, kept: Kept) -> list[str]:
    """A note on states that the model returns beside its logits, where they are narrower now."""
    survivors, changed = Survivors(groups, kept), {}
    for path, value in zip(graph.paths, graph.outputs, strict=True) if graph.states else ():
        new = survivors.shape(value)
        pairs = [f"{before} -> {after}" for before, after in zip(value.shape, new, strict=True) if before != after]
        if path.partition(".")[0] in graph.states and pairs:
            changed.setdefault(path.partition(".")[0], ", ".join(pairs))
    if not changed:
        return []
    said = folded([f"{name} ({widths})" for name, widths in changed.items()])
    return [f'note: states beside the logits follow what is cut: {said}; outputs=("logits", {next(iter(changed))!r}) keeps one whole']


def _used(graph: Graph) -> Iterator[tuple]:
    """The attributes that any run used."""
    exprs: list[Any] = [call.expr for call in graph.calls] + list(graph.floats) + [doubt.expr for doubt in graph.doubts]
    exprs += [side for pair in graph.equals for side in pair] + [side for branch in graph.outcomes for side in (branch.left, branch.right)]
    for expr in exprs:
        yield from (leaf[1] for leaf in leaves(expr) if leaf[0] == "attr")


class _Axes:
    """What became of axes of features (of places and samples an attribute says nothing), by module: of those as long as an attribute of it says."""

    def __init__(self, groups: Groups, kept: Kept, unread: Iterable[tuple[tuple, int]]) -> None:
        self.graph, self.survivors = groups.graph, Survivors(groups, kept)
        self.features = self.graph.marks.features(groups.root)
        self.of_features: dict[int, bool] = {}  # by the id of a field
        self.asked: dict[str, set[int]] = defaultdict(set)
        for (name, _), length in unread:
            self.asked[name].add(length)

    def of_results(self, parts: bool = False) -> Lengths:
        """Of the results of a module's own calls (``parts``: of those that take parts of an axis)."""
        became: Lengths = defaultdict(lambda: defaultdict(set))
        for node in self.graph.nodes:
            if node.module in self.asked and (node.op.part or not parts):
                for value in node.outs:
                    self.add(became, node.module, value)
        return became

    def of_tensors(self) -> Lengths:
        """Of a module's tensors, and of those of the modules in it."""
        became: Lengths = defaultdict(lambda: defaultdict(set))
        for name, value in self.graph.leaves.items():
            if name in self.graph.parameters:
                path = name.split(".")
                for depth in range(len(path)):
                    module = ".".join(path[:depth])
                    if module in self.asked:
                        self.add(became, module, value)
        return became

    def add(self, became: Lengths, module: str, value: Value) -> None:
        for dim, length in enumerate(value.shape) if value.fields else ():
            if length in self.asked[module] and any(self.featured(field) for field in value.fields if field.shape[dim] > 1):
                became[module][length].add(self.survivors.count(value, dim))

    def featured(self, field: Array) -> bool:
        """Whether a field has labels of features; most tensors share their fields with others."""
        if id(field) not in self.of_features:
            self.of_features[id(field)] = bool(self.features[self.survivors.root[field]].any())
        return self.of_features[id(field)]


def reads_as_size(kind: type, key: str) -> bool:
    """Whether the code of a class gives an attribute to calls that take sizes, and reads it nowhere else but where it is made."""
    return reading(kind, key)[0]


def reading(kind: type, key: str) -> tuple[bool, frozenset[str]]:
    """The same, and the names of those calls."""
    if kind not in _READS:
        uses: dict[str, list[str]] = defaultdict(list)
        for base in kind.__mro__:
            if not foreign(base):
                for name, call in _reads(base):
                    uses[name].append(call)
        _READS[kind] = {name: (all(sized(call) for call in calls), frozenset(calls)) for name, calls in uses.items()}
    return _READS[kind].get(key, (False, frozenset()))


def _reads(kind: type) -> Iterator[tuple[str, str]]:
    """Every ``self.name`` that a class reads outside of ``__init__``, and the call that it is given to ("" where it is none)."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return
    for method in ast.walk(tree):
        if isinstance(method, ast.FunctionDef) and method.name != "__init__" and method.args.args:
            yield from _mentions(method, method.args.args[0].arg, "")


def _mentions(node: ast.AST, own: str, call: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own and isinstance(node.ctx, ast.Load):
        yield node.attr, call
    for child in ast.iter_child_nodes(node):
        inside = call
        if isinstance(node, ast.Call) and child is not node.func:
            inside = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        elif isinstance(node, ast.Subscript) and child is node.slice:
            inside = "__getitem__"
        elif not isinstance(child, ast.expr | ast.keyword | ast.slice):
            inside = ""
        yield from _mentions(child, own, inside)
