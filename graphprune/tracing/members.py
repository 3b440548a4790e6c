"""Experts that are modules of a list: which entry of a choice leads to which module, and to nothing else.

Code that calls its experts one by one (``for i, expert in enumerate(self.experts): rows = torch.where(at == i)``) compares what was chosen with single numbers,
or takes single positions of a table of it (``mask[i]``, ``gates[:, i]``). :func:`members` follows what hangs on each entry, call by call: what is all zeros, or
has no rows, where the entry is not chosen, until it is added to (or written into) what all experts share, which is then as if the expert were not there. It
accepts a list where every entry has its own module, all are alike, and do alike; whatever else is met is the reason for which they stay whole.

>>> from torch import nn
>>> from .trace import trace
>>> class Mixture(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.router, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
...     def forward(self, x):
...         share, at = self.router(x).softmax(-1).topk(2)
...         out = torch.zeros_like(x)
...         for i, expert in enumerate(self.experts):
...             rows, place = torch.where(at == i)
...             out = out.index_add(0, rows, expert(x[rows]) * share[rows, place, None])
...         return out
>>> trace(Mixture(), torch.randn(5, 4)).mixtures[0].lists
('experts',)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..operations.labels import Array
from ..operations.notation import Value
from .choices import Choice
from .node import SHAPED, Node

# What a tensor is where an entry is not chosen: zeros, without any rows, or not there to be asked.
ZERO, EMPTY, OTHER = "zero", "empty", "other"
ANY_ZERO, FIRST_ZERO = (
    frozenset(("bitwise_and", "logical_and")),
    frozenset(("floor_divide", "true_divide", "gt", "ne", "any", "count_nonzero", "index", "gather")),
)
FILLED = frozenset(("masked_fill", "masked_scatter"))
CONSTANT, SUMMED = 64, 1  # entries of a tensor that code makes of nothing which is known by them; what is left of the history of a sum over experts
LISTED = "experts are modules of a list: what='experts' removes them"


@dataclass(frozen=True)
class Mixture:
    """Choices along one axis (one for every run) whose entries are modules: entry ``e`` is the ``e``-th of each of the ``lists`` (paths)."""

    choices: tuple[Choice, ...]
    lists: tuple[str, ...]


class _Left(Exception):
    """Why a list stays whole."""


def members(
    choices: Sequence[Choice],
    runs: Sequence[Sequence[Node]],
    outputs: Sequence[Value],
    constants: Mapping[str, torch.Tensor],
    root: Array,
    model: nn.Module,
) -> list[Mixture]:
    """The choices that lead to modules of lists; of the others that are compared with single numbers, or of which single positions are taken, ``failed`` says
    why they do not. ``runs`` are the calls of every run, ``constants`` the tensors that code made of nothing, by the name of their leaf, ``root`` what every
    label is one with."""
    same: dict[bytes, list[Choice]] = defaultdict(list)  # a choice is made anew in every run
    for choice in choices:
        same[root[choice.labels].tobytes()].append(choice)
    ends, followed, mixtures = {id(value) for value in outputs}, [], []
    for group in same.values():
        if any(each.compared or each.addressed or each.singled for each in group) and not any(each.failed or each.stacks for each in group):
            regions = _Regions(tuple(group), root, ends)
            with _reported(group):
                for run in runs:
                    regions.follow(run)
                followed.append(regions)
    absorbing = set().union(*(regions.absorbing for regions in followed))
    for regions in followed:
        with _reported(regions.choices):
            mixtures.append(Mixture(regions.choices, _lists(regions, absorbing, constants, model)))
    return mixtures


@contextmanager
def _reported(choices: Sequence[Choice]) -> Iterator[None]:
    try:
        yield
    except _Left as reason:
        for choice in choices:
            choice.failed = str(reason)


@dataclass
class _Regions:
    """The calls that hang on single entries: for every run, the entry (or None) that each call is for."""

    choices: tuple[Choice, ...]
    root: Array
    outputs: set[int]
    marks: dict[int, tuple[str, int]] = field(default_factory=dict)  # by id of a value: what it is where its entry is not chosen, and which entry
    sparse: set[int] = field(default_factory=set)  # tables over all entries that are zero where one is not chosen
    zeros: set[int] = field(default_factory=set)
    rows: dict[int, int] = field(default_factory=dict)  # stacks of what single entries give, by id: along which axis
    runs: list[tuple[Sequence[Node], list[int | None]]] = field(default_factory=list)  # the calls, and the entry (or None) that each is for
    absorbing: set[int] = field(default_factory=set)  # ids of the calls after which an entry is no longer seen
    heads: set[int] = field(default_factory=set)  # ids of the calls that take out one entry
    own: set[int] = field(default_factory=set)  # ids of the calls for one entry that take it out of what is known of all

    @property
    def size(self) -> int:
        """How many entries there are."""
        return self.choices[0].labels.size

    def chosen(self, value: Value) -> bool:
        """Whether a tensor holds positions that were chosen."""
        return any(value.numbers is choice for choice in self.choices)

    def along(self, value: Value, dim: int) -> bool:
        """Whether an axis of a tensor is the one that was chosen from."""
        labels, dim = self.root[self.choices[0].labels], int(dim) % max(1, len(value.shape))
        return any(entries.shape[dim] == entries.size == labels.size and np.array_equal(self.root[entries.ravel()], labels) for entries in value.fields)

    def follow(self, nodes: Sequence[Node]) -> None:
        """One run."""
        entries: list[int | None] = []
        for node in nodes:
            entries.append(self._forward(node))
        self._backward(nodes, entries)
        self.runs.append((nodes, entries))
        if any(id(value) in self.outputs and id(value) in self.marks for node in nodes for value in node.outs):
            raise _Left("what single experts give is an output")

    def _forward(self, node: Node) -> int | None:
        marked = [value for value in node.held if id(value) in self.marks]
        if any(id(value) in self.rows for value in node.held):
            self._summed(node)
            return None
        if not marked:
            return self._taken(node)
        entries = {self.marks[id(value)][1] for value in marked}
        kind = self._kind(node, marked)
        if len(entries) > 1 and not self._adds(node, marked):
            self._stacked(node, marked)
            return None
        entry = min(entries)
        self._owned(node, entry)
        if kind is None:
            self.absorbing.add(id(node))
        elif node.op.writes and not (isinstance(node.args[0], Value) and id(node.args[0]) in self.marks):
            raise _Left(f"what expert {entry} gives is written by {node.op.short}{_at(node)}")
        else:
            for value in node.outs:
                self.marks[id(value)] = kind, entry
        return max(entries)

    def _owned(self, node: Node, entry: int) -> None:
        """A call for one entry may take that entry out of a table over all of them; no other."""
        taken = _position(node, node.args[0], self) if node.args and isinstance(node.args[0], Value) else None
        if taken is None or self.chosen(node.args[0]):
            return
        if taken != entry:
            raise _Left(f"expert {entry} reads what belongs to expert {taken}{_at(node)}")
        self.own.add(id(node))

    def _taken(self, node: Node) -> int | None:
        """A call that is given nothing of a single entry yet: it may take out one, or make a table over all of them."""
        short = node.op.short.rstrip("_")
        if short == "eq" and isinstance(node.args[0], Value) and self.chosen(node.args[0]):
            entry = node.args[1].entry if isinstance(node.args[1], Value) else int(node.args[1])
            if entry >= 0:
                return self._head(node, ZERO, entry)
        if node.constant == 0 or _zero(node, {id(value) for value in node.held if id(value) in self.zeros}):
            self.zeros |= {id(value) for value in node.outs}
        return self._taken_from(node, node.args[0]) if node.args and isinstance(node.args[0], Value) else None

    def _taken_from(self, node: Node, source: Value) -> int | None:
        kind, entry = ZERO if id(source) in self.sparse else OTHER, _position(node, source, self)
        if entry is not None:
            return self._head(node, kind, entry)
        if node.op.short == "unbind" and self.along(source, node.argument("dim", 0)) and len(node.outs) == self.size:
            self.heads.add(id(node))
            self.marks.update((id(value), (kind, position)) for position, value in enumerate(node.outs))
        elif self._keeps_table(node, source):
            self.sparse |= {id(value) for value in node.outs}
        return None

    def _head(self, node: Node, kind: str, entry: int) -> int:
        self.heads.add(id(node))
        self.marks.update((id(value), (kind, entry)) for value in node.outs)
        return entry

    def _keeps_table(self, node: Node, source: Value) -> bool:
        """Whether the result is zero at entries that are not chosen."""
        op, short = node.op, node.op.short.rstrip("_")
        if op.writes_at and op.addresses is not None:
            target, _, index = op.addresses(*node.args, **node.kwargs)[0]
            return id(target) in self.zeros and self.chosen(index)
        if short == "where":
            return id(source) in self.sparse and self._nothing(node.args[2])
        return _zero(node, {id(value) for value in node.held if id(value) in self.sparse})

    def _kind(self, node: Node, marked: list[Value]) -> str | None:
        """What the result is where the entry is not chosen; None where it is what it would be without that."""
        kinds = {id(value): self.marks[id(value)][0] for value in marked}
        target = node.args[0] if node.args and isinstance(node.args[0], Value) else None
        if target is not None and id(target) not in kinds:
            reason = self._reason_to_write(node, kinds)
            if reason is not None:
                return None if reason in (EMPTY, ZERO) else OTHER
        if node.op.short.rstrip("_") == "where" and len(node.args) == 3 and kinds.get(id(node.args[0])) == ZERO:
            return kinds.get(id(node.args[2]), ZERO if self._nothing(node.args[2]) else None)
        if node.op.arithmetic in ("add", "sub"):
            return self._sum(node, kinds)
        return self._read(node, kinds, kinds.get(id(target)))

    def _reason_to_write(self, node: Node, kinds: Mapping[int, str]) -> str | None:
        """What the places are, where the entry is not chosen, at which a call writes into what is no entry's; None for a call that writes at no places."""
        op, short = node.op, node.op.short.rstrip("_")
        if op.writes_at and op.addresses is not None:
            return EMPTY if kinds.get(id(op.addresses(*node.args, **node.kwargs)[0][2])) == EMPTY else OTHER
        if short in ("index_put", "_index_put_impl"):
            return EMPTY if any(kinds.get(id(index)) in (EMPTY, ZERO) for index in node.args[1]) else OTHER
        if short in FILLED:
            return ZERO if kinds.get(id(node.args[1])) == ZERO else OTHER
        return None

    def _read(self, node: Node, kinds: Mapping[int, str], first: str | None) -> str:
        """What comes of what is read, where the entry is not chosen; ``first`` is what the first argument is there."""
        op = node.op
        if op.writes_at:
            return OTHER
        if op.short == "index" and any(kinds.get(id(index)) in (EMPTY, ZERO) for index in node.args[1]):
            return EMPTY
        if op.addresses is not None and any(kinds.get(id(index)) == EMPTY for _, _, index in op.addresses(*node.args, **node.kwargs)):
            return EMPTY
        if _zero(node, {key for key, kind in kinds.items() if kind == ZERO}):
            return ZERO
        if op.finds and first == ZERO:
            return EMPTY
        return EMPTY if EMPTY in kinds.values() and (op.pointwise or (op.moves or op.part) and first == EMPTY) else OTHER

    def _nothing(self, item: Any) -> bool:
        """Whether something is the number zero, also as a tensor."""
        return id(item) in self.zeros and not item.shape if isinstance(item, Value) else item == 0

    def _sum(self, node: Node, kinds: Mapping[int, str]) -> str | None:
        one, other = node.args[:2]
        values = [value for value in (one, other) if isinstance(value, Value)]
        zero = [kinds.get(id(value)) == ZERO for value in values]
        if len(values) == 1:
            return ZERO if zero[0] and other == 0 else EMPTY if EMPTY in kinds.values() else OTHER
        if all(zero):
            same = len({self.marks[id(value)][1] for value in values}) == 1
            return ZERO if same else None
        if EMPTY in kinds.values():
            return EMPTY
        last = zero[1] or node.op.arithmetic == "add" and zero[0]
        rest = values[0] if zero[1] else values[1]
        return None if last and id(rest) not in kinds and rest.shape == node.outs[0].shape else OTHER

    def _adds(self, node: Node, marked: list[Value]) -> bool:
        return node.op.arithmetic == "add" and all(self.marks[id(value)][0] == ZERO and value.shape == node.outs[0].shape for value in marked)

    def _stacked(self, node: Node, marked: list[Value]) -> None:
        """What all entries give, one beside the other: along an axis of its own, to be summed over."""
        entries = [self.marks[id(value)][1] for value in marked]
        together = node.op.short == "stack" and entries == list(range(self.size)) and len(marked) == len(node.held)
        if not together or any(self.marks[id(value)][0] != ZERO for value in marked):
            raise _Left(f"experts {min(entries)} and {max(entries)} meet in {node.op.short}{_at(node)}")
        self.rows[id(node.outs[0])] = int(node.argument("dim", 0)) % len(node.outs[0].shape)
        self.absorbing.add(id(node))

    def _summed(self, node: Node) -> None:
        axis = next(self.rows[id(value)] for value in node.held if id(value) in self.rows)
        dims = node.argument("dim", None)
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        if node.op.short != "sum" or [int(dim) % len(node.held[0].shape) for dim in dims] != [axis]:
            raise _Left(f"what experts give meets in {node.op.short}{_at(node)}")

    def _backward(self, nodes: Sequence[Node], entries: list[int | None]) -> None:
        """What only calls for one entry need is for that entry as well."""
        users: dict[int, set[int | None]] = defaultdict(set)
        for index in range(len(nodes) - 1, -1, -1):
            node = nodes[index]
            if entries[index] is None and not node.op.writes and id(node) not in self.heads and id(node) not in self.absorbing:
                wanted = set().union(*(users[id(value)] for value in node.outs))
                if len(wanted) == 1 and not any(id(value) in self.outputs for value in node.outs):
                    entries[index] = wanted.pop()
            shared = id(node) in self.absorbing or id(node) in self.heads
            for value in node.held:
                mark = self.marks.get(id(value))
                users[id(value)].add(mark[1] if mark else None if shared else entries[index])


def _zero(node: Node, zero: set[int]) -> bool:
    """Whether the result is all zeros if the values ``zero`` (by id) are."""
    op, short = node.op, node.op.short.rstrip("_")
    source = node.args[0] if node.args and isinstance(node.args[0], Value) else None
    if not zero or source is None:
        return False
    first = id(source) in zero
    if short in ("gt", "ne"):
        return first and not isinstance(node.args[1], Value) and node.args[1] == 0
    if op.pointwise and not op.moves:
        return _pointwise_zero(node, zero)
    if node.products:
        return node.bias is None
    return first and (op.moves and not op.fills or op.part or op.statistic in ("sum", "norm", "mean") or short in FIRST_ZERO)


def _pointwise_zero(node: Node, zero: set[int]) -> bool:
    op, short = node.op, node.op.short.rstrip("_")
    if op.zero == "one" or short in ANY_ZERO:
        return True
    if op.zero == "all" and len(node.held) > 1 and all(id(value) in zero for value in node.held):
        return True
    return id(node.args[0]) in zero and (op.zero == "first" or short in FIRST_ZERO)


def _position(node: Node, source: Value, regions: _Regions) -> int | None:
    """The one entry that a call takes of the axis that was chosen from."""
    short = node.op.short
    if short in ("select", "slice"):
        dim = int(node.argument("dim", 0))
        if not regions.along(source, dim):
            return None
        size = regions.size
        if short == "select":
            return int(node.argument("index")) % size
        start, end = (int(node.argument(name) if node.argument(name) is not None else other) for name, other in (("start", 0), ("end", size)))
        start, end = (max(0, min(size, bound + size if bound < 0 else bound)) for bound in (start, end))
        return start if end - start == 1 else None
    if short == "index":
        for dim, index in enumerate(node.args[1]):
            if isinstance(index, Value) and regions.chosen(index) and index.entry >= 0 and regions.along(source, dim):
                return index.entry
    return None


def _at(node: Node) -> str:
    place = ", ".join(part for part in (node.module, node.line) if part)
    return f" ({place})" if place else ""


def _lists(regions: _Regions, absorbing: set[int], constants: Mapping[str, torch.Tensor], model: nn.Module) -> tuple[str, ...]:
    """The lists of modules whose places are the entries; raises :class:`_Left`."""
    size = regions.size
    readers: dict[str, set[int | None]] = defaultdict(set)
    for nodes, entries in regions.runs:
        for node, entry in zip(nodes, entries, strict=True):
            for value in node.held:
                if value.leaf and not value.leaf.startswith("<"):
                    readers[value.leaf].add(entry)
    owned: dict[int, list[str]] = defaultdict(list)
    for name, entries in readers.items():
        entry = next(iter(entries))
        if len(entries) == 1 and entry is not None:
            owned[entry].append(name)
    lists = [_holders(owned[entry], entry, size, model) for entry in range(size)]
    if any(not each for each in lists):
        alone = f"no module is read for expert {next(entry for entry, each in enumerate(lists) if not each)} alone"
        raise _Left(f"{alone}; experts go that are modules of a list, or stacked weights that are addressed by the chosen positions")
    if any(each != lists[0] for each in lists):
        raise _Left("experts are not at the same places of the same lists")
    owners = _alike(lists[0], readers, model)
    _done_alike(regions, absorbing, constants, owners)
    return tuple(sorted(lists[0]))


def _holders(names: list[str], entry: int, size: int, model: nn.Module) -> set[str]:
    """The lists in which the tensors that are read for one entry lie, at its place."""
    paths = set()
    for name in names:
        parts = name.split(".")
        path = next((path for path in (".".join(parts[:end]) for end in range(len(parts))) if _is_place(model, path, parts, entry, size)), None)
        if path is None:
            raise _Left(f"{name} is read for expert {entry} alone, and is in no list of {size} modules at that place")
        paths.add(path)
    return paths


def _is_place(model: nn.Module, path: str, parts: list[str], entry: int, size: int) -> bool:
    try:
        holder = model.get_submodule(path)
    except AttributeError:
        return False
    return is_list(holder) and len(places(holder)) == size and places(holder)[entry] == parts[path.count(".") + 1 if path else 0]


def is_list(module: nn.Module) -> bool:
    """Whether it is a plain list of modules, or one that passes over what is gone."""
    return type(module) is nn.ModuleList or bool(getattr(type(module), "passes_over", False))


def places(holder: Any) -> list[str]:
    """The keys of the modules that a list gives out, in order."""
    return holder.keys_there() if hasattr(holder, "keys_there") else list(holder._modules)


def _alike(lists: set[str], readers: Mapping[str, set[int | None]], model: nn.Module) -> Mapping[str, str]:
    """Every module of the lists is its entry's alone and has the shapes of the others; returns what its tensors are called in all of them."""
    owners: dict[str, str] = {}
    for path in sorted(lists):
        holder = model.get_submodule(path)
        shapes = []
        for entry, key in enumerate(places(holder)):
            child: Any = holder._modules[key]
            inside = {
                name: tuple(tensor.shape) for name, tensor in (*child.named_parameters(remove_duplicate=False), *child.named_buffers(remove_duplicate=False))
            }
            shapes.append((type(child), inside))
            for name in inside:
                whole = f"{path}.{key}.{name}" if path else f"{key}.{name}"
                if readers.get(whole, {entry}) != {entry}:
                    raise _Left(f"{whole} is read for other experts as well")
                owners[whole] = f"{path}.*.{name}"
        if any(each != shapes[0] for each in shapes):
            raise _Left(f"the experts of {path} are not alike: their classes or shapes differ")
    return owners


def _done_alike(regions: _Regions, absorbing: set[int], constants: Mapping[str, torch.Tensor], owners: Mapping[str, str]) -> None:
    """What all experts share takes up the same of each of them: the same calls, with the same numbers, on the same tensors, but for its own."""
    taken: dict[int, dict[int, int]] = defaultdict(dict)  # by entry: what is taken up, and how often in one run
    for nodes, _ in regions.runs:
        histories = _histories(nodes, regions, absorbing, constants, owners)
        counts: dict[int, Counter] = defaultdict(Counter)
        for node in nodes:
            if id(node) in regions.absorbing:
                for value in node.held:
                    if id(value) in regions.marks:
                        counts[regions.marks[id(value)][1]][hash((str(node.op.func), histories[id(value)], _numbers(node)))] += 1
        for entry, count in counts.items():
            for history, often in count.items():
                taken[entry][history] = max(often, taken[entry].get(history, 0))
    if len({tuple(sorted(taken[entry].items())) for entry in range(regions.size)}) > 1:
        raise _Left("what is done with one expert is not what is done with the others on this example (where few of its tokens reach each, give one with more)")


def _histories(
    nodes: Sequence[Node], regions: _Regions, absorbing: set[int], constants: Mapping[str, torch.Tensor], owners: Mapping[str, str]
) -> Mapping[int, int]:
    """How every value came about, as a number; where experts have been added up, that they were."""
    known: dict[int, int] = {}

    def of(value: Value) -> int:
        if id(value) not in known:
            constant = constants.get(value.leaf)
            written = None if constant is None or constant.numel() > CONSTANT or constant.is_meta else (str(constant.dtype), str(constant.tolist()))
            known[id(value)] = hash(written or owners.get(value.leaf, value.leaf))
        return known[id(value)]

    for node in nodes:
        if id(node) in absorbing:
            rest = [of(value) for value in node.held if id(value) not in regions.marks]
            known |= {id(value): rest[0] if rest else SUMMED for value in node.outs}
            continue
        head = id(node) in regions.heads
        held = tuple(of(value) for value in (node.held[:1] if head else node.held))
        if node.op.arithmetic == "add" and len(held) == 1 and node.args[1] == 0:  # how a sum starts
            known[id(node.outs[0])] = held[0]
            continue
        if node.op.regroups and _but_ones(node.held[0]) == _but_ones(node.outs[0]):  # indexing takes axes of one entry off where only one row is chosen
            known[id(node.outs[0])] = held[0]
            continue
        said = hash((str(node.op.func), held, _numbers(node, head or id(node) in regions.own)))
        known |= {id(value): hash((said, 0 if head else at)) for at, value in enumerate(node.outs)}
    return known


def _but_ones(value: Value) -> list[int]:
    return [size for size in value.shape if size != 1]


def _numbers(node: Node, head: bool = False) -> str:
    """The plain arguments of a call; sizes that its tensors show, and the number of the expert that is taken out, are the same for all."""
    extents = {size for value in (*node.held, *node.outs) for size in value.shape}
    names = node.op.arguments

    def word(item: Any, name: str = "") -> Any:
        if isinstance(item, Value):
            return "tensor"
        if isinstance(item, list | tuple):
            return [word(each, name) for each in item]
        if isinstance(item, int) and not isinstance(item, bool):
            return "entry" if head else "size" if name in SHAPED and int(item) in extents else int(item)
        return str(item)

    named = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return str([(name, word(item, name)) for name, item in sorted(named.items())])
