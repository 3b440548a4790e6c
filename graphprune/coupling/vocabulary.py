"""The vocabulary of a model: the table that whole-number inputs address, and the axis of the outputs that has one entry for each of its rows.

What happens to the ids on their way is followed call by call (:func:`vocabulary`): they may be moved, compared with single tokens, and looked up. Whatever
else is done with them leaves the vocabulary whole, with the reason.

>>> from torch import nn
>>> from ..tracing.trace import trace
>>> net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
>>> found = vocabulary(trace(net, torch.zeros(1, 3, dtype=torch.long)))
>>> found.size, found.tables, found.inputs
(7, ('0.weight',), (0,))
>>> [(group.size, sorted(group.places)) for group in coupled(trace(net, torch.zeros(1, 3, dtype=torch.long)))]
[(7, [('0.weight', 0), ('1.bias', 0), ('1.weight', 0)])]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..operations.labels import Array
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.node import Node
from ..tracing.outputs import OUTPUT
from ..tracing.trees import tensors
from .groups import Groups, couple

COMPARES = frozenset(("eq", "ne"))


@dataclass
class Vocabulary:
    """``tables`` are the tensors whose rows are tokens, ``size`` how many; ``inputs`` the arguments that hold ids; ``compared`` the ids that the code compares
    with, or writes among them; ``heads`` the (value, axis) pairs of the outputs with an entry for every token. ``why`` says what holds it, if anything does."""

    size: int = 0
    tables: tuple[str, ...] = ()
    inputs: tuple[int | str, ...] = ()
    compared: list[int] = field(default_factory=list)
    heads: list[tuple[Value, int]] = field(default_factory=list)
    looked_up: list[Node] = field(default_factory=list)
    why: str = ""


def vocabulary(graph: Graph) -> Vocabulary:
    """What the graph says of tokens; ``size`` is 0 where no input addresses a table."""
    if "vocabulary" not in graph.derived:
        graph.derived["vocabulary"] = _found(graph)
    return graph.derived["vocabulary"]


def predicted(graph: Graph) -> int | None:
    """How many entries the vocabulary has whose scores the model returns, along the last axis of an output; None for any other model.

    >>> from torch import nn
    >>> from ..tracing.trace import trace
    >>> words = torch.zeros(1, 4, dtype=torch.long)
    >>> predicted(trace(nn.Sequential(nn.Embedding(11, 3), nn.Linear(3, 11)), words)), predicted(trace(nn.Embedding(11, 3), words))
    (11, None)
    """
    words = vocabulary(graph)
    return words.size if any(axis == len(value.shape) - 1 > 0 for value, axis in words.heads) else None


def coupled(graph: Graph) -> Groups:
    """The groups of a graph of which the tokens alone may go: one group, or none where something holds them."""
    words = vocabulary(graph)
    labels = graph.labels
    root = labels.partition().parent
    tokens = np.zeros(len(root), dtype=bool)
    along = [_along(graph.leaves[name], 0) for name in words.tables]
    every = along + [_along(value, dim) for value, dim in words.heads]
    if words.size and not words.why:
        tokens[root[np.concatenate(every)]] = True
    others = np.flatnonzero(~tokens[root])
    calls = {(node.op.short, node.module, node.where) for node in words.looked_up}
    expected = [reason.text == OUTPUT or (reason.op, reason.module, reason.where) in calls for reason in labels.reasons]
    locks = [(array[~tokens[root[array]]] if expected[reason] else array, reason) for array, reason in labels.locks]
    joins = [(every[0], other) for other in every[1:]] if tokens.any() else []
    over = [(left, reason) for _, left, _, reason in labels.conditions if reason >= 0 and tokens[root[left]].any()]  # whatever is a feature, tokens are
    text = words.why or ("only the vocabulary is cut" if words.size else "no whole-number input of this model looks up rows of a table")
    graph = replace(graph, labels=replace(labels, locks=[*locks, *over]), choices=[])
    return couple(graph, locks=((others, text),), free=("position",), joins=joins)


def _along(value: Value, dim: int) -> Array:
    return next(entries.ravel() for entries in value.fields if entries.shape[dim] == entries.size > 1)


def _found(graph: Graph) -> Vocabulary:
    names = list(_arguments(graph))
    runs = [_followed(graph, value, name) for value, (name, ids) in zip(graph.inputs, names, strict=False) if ids]
    runs = [run for run in runs if run.tables]
    if not runs:
        return Vocabulary()
    sizes = {run.tables: _heads(graph, run.tables) for run in runs}
    chosen = max(runs, key=lambda run: bool(sizes[run.tables]))  # the first one, unless another one's rows come back in an output
    same = [run for run in runs if {*run.tables} & {*chosen.tables}]
    tables = tuple(dict.fromkeys(name for run in same for name in run.tables))
    whole = Vocabulary(graph.leaves[tables[0]].shape[0], tables, tuple(name for run in same for name in run.inputs), heads=_heads(graph, tables))
    for run in same:
        whole.compared += [each for each in run.compared if each >= 0]  # what is below zero is no token
        whole.looked_up += run.looked_up
    whole.why = next((why for why in (*(run.why for run in same), _held(graph, whole)) if why), "")
    return whole


def _held(graph: Graph, words: Vocabulary) -> str:
    """What holds the whole vocabulary beside single calls on its way."""
    mixing = next((node for value, _ in words.heads for node in [_mixing(graph, value, words.size)] if node is not None), None)
    if mixing is not None:
        return f"what every token gets depends on all of them{_place(mixing)}"
    if any(graph.leaves[name].shape[0] != words.size for name in words.tables):
        return f"token ids look up rows of tables of several lengths ({', '.join(words.tables)})"
    return ""


def _arguments(graph: Graph) -> Iterator[tuple[int | str | None, bool]]:
    """The arguments of the example that are tensors, in the order of the inputs: their number or name (None inside of others), and whether they may be ids."""
    args, kwargs = graph.example
    for name, argument in (*enumerate(args), *kwargs.items()):
        for tensor in tensors(argument, torch.Tensor):
            whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
            yield (name if argument is tensor else None), whole


def _followed(graph: Graph, value: Value, name: int | str | None) -> Vocabulary:
    """Where one input goes."""
    words, carriers = Vocabulary(inputs=() if name is None else (name,)), {id(value)}
    if name is None:
        words.why = "token ids are inside of another argument of the model"
    for node in graph.nodes:
        ids = [each for each in node.held if id(each) in carriers]
        if ids:
            _met(words, node, ids, carriers)
    return words


def _met(words: Vocabulary, node: Node, ids: list[Value], carriers: set[int]) -> None:
    """What a call does with ids."""
    op = node.op
    if table := _looked_up(node, ids):
        words.tables += (table,) if table not in words.tables else ()
        words.looked_up.append(node)
        return
    scalars = _scalars(node)
    if op.short in COMPARES and len(node.held) == 1 and scalars:
        words.compared += scalars
    elif op.factory or op.shape_only:
        return
    elif op.puts and node.args[0] in ids and scalars:
        words.compared += scalars[-1:]
        carriers.update(map(id, node.outs))
    elif _passes_on(node) and all(each in ids or each.leaf or id(each) in carriers for each in node.held):
        carriers.update(map(id, node.outs))
    else:
        words.why = words.why or f"token ids are more than looked up{_place(node)}"


def _scalars(node: Node) -> list[int]:
    return [each for each in (*node.args, *node.kwargs.values()) if type(each) is int]


def _looked_up(node: Node, ids: list[Value]) -> str:
    """The table whose rows a call reads at the ids, and at nothing else, if it does that."""
    op = node.op
    slots = [slot for slot in op.addresses(*node.args, **node.kwargs) if any(slot[2] is each for each in ids)] if op.addresses is not None else []
    if len(slots) != 1 or op.writes_at:
        return ""
    target, dim, _ = slots[0]
    return target.leaf if dim == 0 and len(target.shape) == 2 and not target.leaf.startswith("<") else ""


def _passes_on(node: Node) -> bool:
    """Whether a call moves what it is given, or copies it."""
    return node.op.moves or node.op.part or node.op.overwrites


def _place(node: Node) -> str:
    return f" ({', '.join(part for part in (node.op.short, node.module, node.line) if part)})"


def _mixing(graph: Graph, value: Value, size: int) -> Node | None:
    """The call between the product that gives every token a number and the output that does more than to work entry by entry, if there is one."""
    todo, seen = [value], set()
    while todo:
        now = todo.pop()
        if now.leaf or now.node in seen or size not in now.shape:
            continue
        seen.add(now.node)
        node = graph.nodes[now.node]
        if node.products:
            continue
        if not (node.is_move or node.is_pointwise or node.op.part or node.op.picks):
            return node
        todo += node.held
    return None


def _heads(graph: Graph, tables: tuple[str, ...]) -> list[tuple[Value, int]]:
    """The axes of outputs that have an entry for every row of the tables: as long, one label each, and not the width of a row."""
    root = graph.labels.partition().parent
    size = graph.leaves[tables[0]].shape[0]
    width = {int(label) for name in tables for label in np.unique(root[_along(graph.leaves[name], 1)])} if graph.leaves[tables[0]].shape[1] > 1 else set()
    made: list[tuple[Value, int]] = []
    for value in graph.outputs:
        for dim, length in enumerate(value.shape):
            entries = [each for each in value.fields if each.shape[dim] == each.size > 1]
            if length != size or len(entries) != 1:
                continue
            labels = np.unique(root[entries[0]])
            if len(labels) == size and not width & {*labels.tolist()}:
                made.append((value, dim))
    return made
