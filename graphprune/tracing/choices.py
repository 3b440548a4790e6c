"""Axes that the code chooses from: the experts of a mixture, of which a router takes the largest few.

``topk``, ``max`` and ``argmax`` return positions along an axis, and what those number decides what may go. Where they address an axis of a learnt weight
(``weights[positions]``, a table of zeros and ones, a product in groups, a sum over the tokens of each expert), entry ``e`` of the router and slice ``e`` of the
weights are one unit. Its removal means that it is never chosen: the router's score of it is minus infinity, so that statistics (a softmax) and the choice
itself are taken over those that stay, and positions count those that stay. What follows the positions here is :func:`carried`, call by call; what it does
not understand leaves the axis whole.

>>> import torch
>>> from torch import nn
>>> from .trace import trace
>>> class Mixture(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.router, self.experts = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4, 4))
...     def forward(self, x):
...         scores, at = self.router(x).topk(2)
...         return (scores.unsqueeze(-1) * torch.einsum("ti,tkio->tko", x, self.experts[at])).sum(1)
>>> [(each.count, each.failed) for each in trace(Mixture(), torch.zeros(5, 4)).choices]
[(2, '')]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..operations import Operation
from ..operations.labels import Array, Fields, Labels, Reason, varying
from ..operations.notation import Value, meet, parse

Carried = tuple[list[Fields], bool]  # the fields of each result, and whether the call sums over any
MINUS_INFINITY = -1e4  # a softmax gives exactly nothing to what is so far below the others


@dataclass(eq=False)
class Choice:
    """``count`` positions of an axis are chosen: ``labels`` names those of the axis, (positions,), and ``entries`` are the labels that stand along it.

    ``stacks`` are the labels of learnt weights along axes that the positions address; ``failed`` says what is done with them otherwise. ``compared``: single
    numbers are compared with the positions; ``singled`` are the positions of the axis that were taken one by one, each with the reason for which it stays
    whole unless all of them lead to modules of a list (:mod:`graphprune.tracing.members`).
    """

    labels: Array
    entries: Array
    count: int
    place: Reason
    stacks: list[Array] = field(default_factory=list)
    failed: str = ""
    compared: bool = False
    addressed: bool = False  # single positions address tables that are no weights
    statistic: bool = False  # the largest itself may be all that is wanted (a pooling), which says nothing of the axis
    read: bool = False  # somebody reads the positions
    tables: list[int] = field(default_factory=list)  # the calls that fill a table of zeros at the positions: with ones, or the share that each has
    fills: bool = False  # a table is filled, of zeros or of minus infinity
    by_table: bool = False  # such a table weighs the experts, and no position addresses one
    singled: list[tuple[Array, int]] = field(default_factory=list)

    @property
    def matters(self) -> bool:
        return self.read or not self.statistic


def chosen(labels: Labels, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], place: Reason) -> list[Choice]:
    """What a call chooses from, if it does and the axis may be cut: one for each field along it."""
    assert op.chooses_from is not None
    made: list[Choice] = []
    choice = op.chooses_from(*args, **kwargs)
    if choice is None:
        return made
    x, dim, count = choice
    for entries in x.fields:
        if not x.shape or entries.shape[dim] == 1:
            continue
        over = varying(entries)
        dense = entries.reshape([entries.shape[axis] for axis in over])
        along = labels.marginal(dense, (over.index(dim % len(x.shape)),)).ravel()
        made.append(Choice(along, dense, count, place, statistic=bool(op.statistic)))
    for choice in made[1:]:
        labels.join(made[0].labels, choice.labels)
    return made


class _Call(NamedTuple):
    """A call of the run: the recorder, what is known of its operation, its arguments and the values among them, the shapes of its results."""

    recorder: Any
    known: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Value]
    shapes: list[Any]
    reason: int

    @property
    def op(self) -> Operation:
        return self.known.op

    @property
    def first(self) -> Value | None:
        return self.args[0] if self.args and isinstance(self.args[0], Value) else None

    def carry(self) -> Carried:
        """The fields of the results where it does not matter what the values number."""
        return self.known.carry(self.op, self.args, self.kwargs, self.given, self.shapes, self.reason)


def carried(recorder: Any, known: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], reason: int) -> Carried | None:
    """The fields of a call's results where it is given positions that were chosen, or counts of them; None where it is given neither.

    What the results number, or count, is left in ``recorder.numbering``, a pair for each.
    """
    call = _Call(recorder, known, args, kwargs, given, shapes, reason)
    op, first = call.op, call.first
    if first is not None and first.tally is not None:
        return _counts(call, first)
    for value in given if op.rule is not None else ():
        if value.tally is not None:
            value.tally.stacks += _beside(op, args, kwargs, value)
    if first is not None and op.finds and len(first.shape) == 1:
        return _found(recorder, first, shapes)
    numbered = [value for value in given if value.numbers is not None]
    for value in numbered:
        value.numbers.read = True
    return _numbered(call, numbered) if numbered else None


def _numbered(call: _Call, numbered: list[Value]) -> Carried:
    """The fields of the results of a call that is given chosen positions."""
    op, first, outs = call.op, call.first, None
    if first is not None and first.numbers is not None:
        outs = _moved(call, first) if len(numbered) == 1 else None
        outs = _compared(call, first) if outs is None and op.short == "eq" else outs
    if outs is not None:
        return outs
    slots = op.addresses(*call.args, **call.kwargs) if op.addresses is not None else []
    if slots and all(any(value is index for _, _, index in slots) for value in numbered):
        return _addressed(call, slots)
    for value in numbered:
        value.numbers.failed = value.numbers.failed or f"its chosen positions are used by {op.short}"
    return call.carry()


def _compared(call: _Call, first: Value) -> Carried | None:
    """Positions are compared with one number, or with all numbers of the axis that was chosen from: a table of zeros and ones."""
    other = call.args[1]
    if isinstance(other, int) or isinstance(other, Value) and other.entry >= 0:  # one number, known in this run
        first.numbers.compared = True
        return call.carry()
    along = _counting(call.recorder, other, first)
    if not along:
        return None
    first.numbers.tables.append(len(call.recorder.nodes))
    first.numbers.fills = True
    call.recorder.zeros = True  # for what is never chosen
    shape = [1] * len(call.shapes[0])
    shape[along] = first.numbers.labels.size
    return [(first.numbers.labels.reshape(shape),)], False


def _counting(recorder: Any, other: Any, positions: Value) -> int:
    """The axis (from the end) along which a tensor counts up to all of the axis that was chosen from, where positions have no entries; else 0."""
    along, _ = counts_up(recorder, other) if isinstance(other, Value) else (0, None)
    fits = along and other.shape[along] == positions.numbers.labels.size and (len(positions.shape) < -along or positions.shape[along] == 1)
    return along if fits else 0


def counts_up(recorder: Any, value: Value) -> tuple[int, Value | None]:
    """The axis (from the end) along which a tensor is 0, 1, 2 …, and what it was when it was made; (0, None) where it is not."""
    if not value.shape:
        return 0, None
    along = next(dim - len(value.shape) for dim, size in enumerate(value.shape) if size == max(value.shape))
    while 0 <= value.node < len(recorder.nodes):
        node = recorder.nodes[value.node]
        if node.op.enumerates:
            start, step = node.args[0] if len(node.args) > 1 else 0, node.args[2] if len(node.args) > 2 else node.kwargs.get("step", 1)
            return (along, value) if (start, step) == (0, 1) else (0, None)
        if not (node.op.move or node.op.part) or len(node.held) != 1 or max(node.held[0].shape, default=0) != max(value.shape):
            break
        value = node.held[0]
    return 0, None


def _counts(call: _Call, first: Value) -> Carried:
    """Counts stay counts when they are moved, or added up along the axis: nothing is counted for what is gone."""
    op = call.op
    if op.accumulates or op.move is not None or op.pointwise:
        call.recorder.numbering = [(None, first.tally)] * len(call.shapes)
    return ([first.fields], False) if op.accumulates else call.carry()


def _beside(op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], tally: Value) -> list[Array]:
    """The labels of learnt weights along the axis of counts that a product is told (the rows that every expert has)."""
    rule = op.describes(args, kwargs)
    axes = dict(zip(map(id, rule.operands), parse(rule.text)[0], strict=True))
    names = {name for dim in axes.get(id(tally), ()) for name in dim if name[0] not in "_1["}
    found = []
    for value in rule.operands:
        if isinstance(value, Value) and value.zero:
            found += [entries.ravel() for entries in value.fields for dim, own in enumerate(axes[id(value)]) if names & {*own} and entries.shape[dim] > 1]
    return found


def _found(recorder: Any, first: Value, shapes: list[Any]) -> Carried | None:
    """The positions at which something was counted."""
    for choice in recorder.choices:
        if any(entries.size == choice.labels.size and np.array_equal(entries.ravel(), choice.labels) for entries in first.fields):
            recorder.numbering = [(choice, None)] * len(shapes)
            return [()] * len(shapes), False
    return None


def _moved(call: _Call, first: Value) -> Carried | None:
    """Positions stay positions when they are moved, picked or put in order; counted, they have an axis of what they number."""
    op, shapes = call.op, call.shapes
    if op.tallies and len(first.shape) == 1 and shapes[0] == (first.numbers.labels.size,):
        call.recorder.numbering = [(None, first.numbers)]
        return [(first.numbers.labels,)], False
    keeps = (op.moves or op.part or op.orders or op.picks) and not op.fills
    if not (keeps or op.statistic == "other"):
        return None
    if keeps:
        call.recorder.numbering = [(first.numbers, None)] + [(None if op.orders else first.numbers, None)] * (len(shapes) - 1)
    return call.carry()


def _addressed(call: _Call, slots: Sequence[tuple[Any, ...]]) -> Carried:
    """An axis is addressed by what was chosen: its entries are those of the axis that was chosen from."""
    recorder, labels, op = call.recorder, call.recorder.labels, call.op
    target, again = slots[0][0], []
    fields = list(target.fields)
    for _, dim, index in slots:
        choice: Choice | None = index.numbers
        if choice is None:
            continue
        choice.addressed = choice.addressed or (index.entry >= 0 and not target.zero)
        dim %= len(target.shape)
        along = [entries for entries in fields if entries.shape[dim] > 1]
        if target.shape[dim] != choice.labels.size or len(along) != 1 or len(varying(along[0])) > 1:
            choice.failed = choice.failed or f"its chosen positions address an axis that keeps its size ({op.short})"
            continue
        labels.join(choice.labels, along[0].ravel())
        choice.stacks += [along[0].ravel()] if target.zero else []
        if op.writes_at and not target.leaf:
            choice.fills = True
            choice.tables += [] if _lowest(recorder, target) else [len(recorder.nodes)]
        fields = [entries for entries in fields if entries is not along[0]]
        again.append(choice.labels.reshape(along[0].shape))
    bare = replace(target, fields=tuple(fields))
    swapped = tuple([bare if item is target else item for item in call.args])
    named = {key: bare if item is target else item for key, item in call.kwargs.items()}
    outs, reduces = meet(labels, op.describes(swapped, named), call.shapes, call.reason)
    if op.writes_at:  # the result has the axis that was written to
        outs = [(*outs[0], *again), *outs[1:]]
    return outs, reduces


def _lowest(recorder: Any, value: Value) -> bool:
    """Whether all entries of a value are minus infinity, or what a softmax makes as little of."""
    while 0 <= value.node < len(recorder.nodes):
        node = recorder.nodes[value.node]
        if node.constant is not None or not node.op.keeps_zero or len(node.held) != 1:
            return node.constant is not None and node.constant <= MINUS_INFINITY
        value = node.held[0]
    return False


def singled(choices: list[Choice], locks: list[tuple[Array, int]]) -> list[tuple[Array, int]]:
    """The locks that a call made, but for those of positions of an axis that was chosen from: they are left to its choice."""
    others = []
    for array, reason in locks:
        choice = next((each for each in choices if array.size <= each.labels.size and np.isin(array, each.labels).all()), None)
        if choice is None:
            others.append((array, reason))
        else:
            choice.singled.append((array, reason))
    return others


def mattering(labels: Labels, choices: list[Choice], leaves: Iterable[Value], outputs: Iterable[Value]) -> list[Choice]:
    """The choices of which somebody reads the positions; what is done one by one to the axis of the others is what it was without them.

    Those that fill a table are choices of experts where a weight has a matrix for each: of single features only the largest may go on as well, and of these
    one that is gone would be zero, not the least.
    """
    for choice in choices:
        for array, reason in choice.singled if not choice.matters else ():
            labels.lock(array, reason)
    for value in outputs:
        if value.numbers is not None:
            value.numbers.read, value.numbers.failed = True, value.numbers.failed or "its chosen positions are an output"
    tables = [choice for choice in choices if choice.fills and not choice.stacks]
    if tables:
        root = labels.partition().parent
        axes = {root[field.ravel()].tobytes() for leaf in leaves if len(leaf.fields) > 2 for field in leaf.fields}
        for choice in tables:
            choice.by_table = root[choice.labels].tobytes() in axes
    return [choice for choice in choices if choice.matters]


def settled(labels: Labels, choices: list[Choice], listed: Mapping[int, str]) -> tuple[list[Choice], Any]:
    """The choices of which entries may go, and a function that says of a value and labels of it whether all of them are of what is chosen from, and are the
    least of it where they are gone: in a table they are zero. All others stay whole.

    ``listed`` says of a choice (by its id) what stays whole until its modules are asked for.
    """
    if not choices:
        return [], lambda value, array: False
    root = labels.partition().parent
    stacks = [stack for choice in choices for stack in (choice.stacks or [choice.labels] * choice.by_table) if not choice.failed]
    stacks += [choice.labels for choice in choices if id(choice) in listed]
    mixed = np.zeros(len(root), dtype=bool)
    if stacks:
        mixed[root[np.concatenate(stacks)]] = True
    good = []
    for choice in choices:
        fits = not choice.failed and not choice.compared and bool(mixed[root[choice.labels]].all() or mixed[root[choice.entries.ravel()]].all())
        if fits and id(choice) not in listed:
            good.append(choice)
        else:
            text = listed.get(id(choice)) or choice.failed or "the largest along it are chosen, which addresses no learnt weights"
            labels.lock(choice.labels, labels.reason(choice.place._replace(text=text)))
        for array, reason in choice.singled if id(choice) not in listed else ():
            labels.lock(array, reason)
    return good, _least_where_gone(good, root, mixed)


def _least_where_gone(choices: Iterable[Choice], root: Array, mixed: Array) -> Callable[[Value, Array], bool]:
    """The function that :func:`settled` returns; ``mixed`` says of a label whether it is of what is chosen from."""
    tables = [(frozenset(root[choice.labels].tolist()), min(choice.tables)) for choice in choices if choice.tables]

    def least_of(value: Value, array: Array) -> bool:
        labels_of = root[array]
        if not mixed[labels_of].all():
            return False
        return not any((value.node < 0 or value.node >= first) and entries.issuperset(labels_of.ravel().tolist()) for entries, first in tables)

    return least_of


def least(groups: Any, choices: Iterable[Choice]) -> Mapping[int, int]:
    """How many units of a group have to stay so that there is something to choose."""
    found: dict[int, int] = {}
    for choice in choices:
        owner = groups.owner[groups.root[choice.labels]]
        units = groups.root[choice.labels]
        for index in np.unique(owner[owner >= 0]).tolist():
            many = int(np.unique(units[owner == index], return_counts=True)[1].min())
            found[index] = max(found.get(index, 1), min(-(-choice.count // many), groups.groups[index].size))
    return found
