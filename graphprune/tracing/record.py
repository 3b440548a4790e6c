"""Seeing every ATen call of a run, carrying the labels across it, and writing it down: :class:`Recorder`.

What is known of an operation (its rule, whether it moves, computes or is pointwise) is looked up once per overload.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BadRule, GraphpruneError
from ..operations import Operation, resolve
from ..operations.assembly import free, merged
from ..operations.labels import Array, Fields, Labels, Reason, varying
from ..operations.notation import Value, at, meet, parse, result_place
from ..operations.record import pointwise, template
from .choices import Choice, carried, chosen, singled
from .node import Node, line
from .picks import INTEGERS, pick, picked, take, written
from .sizes import Branch, Uses
from .trees import PLAIN, replace, tensors

HERE, TORCH = (str(folder) + os.sep for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))
META, CPU = torch.device("meta"), torch.device("cpu")
RESTRIDED = torch.ops.aten.as_strided_.default
Tensor = torch.Tensor


class Known(NamedTuple):
    """What the recorder asks of one overload, call after call."""

    op: Operation
    name: str
    carry: Callable[..., tuple[list[Fields], bool]]
    shape: Callable[..., Any] | None
    zero: bool
    whole: bool
    draws: bool


def leaves_as_is(tensor: Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> bool:
    """Whether ``as_strided_`` leaves every entry where it is: only steps along axes of one entry change, which torch does to say a memory format.

    >>> leaves_as_is(torch.empty(2, 3, 1, 1), (2, 3, 1, 1), (3, 1, 3, 3)), leaves_as_is(torch.empty(2, 3).t(), (3, 2), (2, 1))
    (True, False)
    """
    if tuple(size) != tuple(tensor.shape) or storage_offset not in (None, tensor.storage_offset()):
        return False
    return all(length < 2 or old == new for length, old, new in zip(size, tensor.stride(), stride, strict=True))


class Recorder(TorchDispatchMode):
    """Sees every ATen call, carries the labels across it, and writes the node down."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is no compiled frame to keep out of a run

    def __init__(self, labels: Labels, names: dict[int, str], stack: list[str], real: bool) -> None:
        super().__init__()
        self.labels, self.names, self.stack, self.real = labels, names, stack, real
        self.values: dict[int, Value] = {}
        self.alive: list[Tensor] = []  # so that their ids stay theirs
        self.activations: dict[int, tuple[weakref.ref, int]] = {}  # by id: results of a run with values, and where they lie; the model decides how long
        self.storages: dict[int, list[int]] = {}  # by address: the storage's number, and how many tensors lie in it (an address may be given away again)
        self.numbered = 0  # storages so far
        self.stale: set[int] = set()  # storages that no longer hold what the model would have there: something without values was written
        self.filled: dict[int, Tensor] = {}  # whole numbers that torch's own code writes where no call shows it (lengths of padded sequences)
        self.leaves: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.earlier = 0  # calls of the runs before this one
        self.uses = Uses(counted=lambda: self.counted)  # of the sizes that this run gives out
        self.extra: list[Node] = []  # of further runs, such as one in training mode
        self.further: list[list[Node]] = []  # the same, run by run
        self.spans: list[tuple[int, int]] = []  # the locks that each call made
        self.numbers: dict[str, Tensor] = {}  # integer buffers, by name
        self.picks: dict[str, list[tuple[Value, int]]] = {}  # what they number
        self.symbols: dict[tuple[Any, ...], int] = {}  # the attributes that remember what they are
        self.choices: list[Choice] = []  # axes that something was chosen from
        self.numbering: list[tuple[Choice | None, Choice | None]] = []  # what the results of the call at hand number, and count
        self.given: dict[str, list[tuple[int | str, Value | None]]] = {}  # by the path of a module: the tensors of its first call
        self.counted_to: dict[int, Any] = {}  # the sizes that were counted to, by the id of the value that has the numbers
        self.zeros = False  # its results are zero in what is gone
        self.turned = 0  # by how many entries what is chosen is moved on, so that others are chosen
        self.read: set[int] = set()  # values that the Python code looked into
        self.looked: list[tuple[str, str]] = []  # where: module and line
        self.stopped = False  # whether a run in training mode did not reach its end
        self.amend: Any = None  # told of every call, with its results
        self.dice = self.rest = torch.get_rng_state()  # torch's random numbers before and after the last call that drew some
        self.seeded = False  # the code sets them
        self.constants: dict[str, Tensor] = {}
        self.copied: dict[int, Array] = {}  # by id, held so that the id stays theirs: fields that number the copies of an expanded axis
        self.known: dict[int, Known] = {}  # by id: overloads live for ever, and their hash is slow
        self.inside: dict[str, bool] = {}  # files that no line of the model's own code is in
        self.caller: CodeType | None = None  # what calls the model: whoever asked for the run stands outside of it
        self.step = -1

    @property
    def counted(self) -> int:
        """How many calls were recorded so far, in all runs."""
        return self.earlier + len(self.nodes)

    def leaf(self, tensor: Tensor, name: str, axes: int | None = None) -> Value:
        """The value of a tensor that the model holds; only its first ``axes`` axes may be cut (all of them, if none are told)."""
        size = tuple(tensor.shape)
        value = Value(size, free(self.labels, size, range(len(size) if axes is None else axes)), zero=True, leaf=name)
        self.leaves[name] = value
        self.keep(tensor, value)
        if tensor.dtype in INTEGERS and tensor.ndim == 1 and not tensor.is_meta:
            self.numbers[name] = tensor
        return value

    def keep(self, tensor: Tensor, value: Value) -> None:
        address = tensor.untyped_storage()._cdata if tensor.layout is torch.strided and not tensor.is_nested else -id(tensor)
        storage = self.storages.get(address)
        if storage is None:
            self.numbered += 1
            storage = self.storages[address] = [self.numbered, 0]
        storage[1] += 1
        value.dtype, value.storage = tensor.dtype, storage[0]
        if address >= 0 and not tensor.is_contiguous():
            value.order = tuple(sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis)))
        self.values[id(tensor)] = value
        if not self.real or value.leaf:
            self.alive.append(tensor)
            return
        key = id(tensor)
        if key in self.activations:  # written to in place
            self.moved_out(key)
        self.activations[key] = weakref.ref(tensor, lambda _: self.freed(key)), address

    def freed(self, key: int) -> None:
        """A result is gone: its id may come to mean another."""
        self.moved_out(key)
        self.values.pop(key, None)

    def moved_out(self, key: int) -> None:
        """One tensor less in a storage, whose address may come to mean another."""
        _, address = self.activations.pop(key)
        storage = self.storages[address]
        storage[1] -= 1
        if not storage[1]:
            del self.storages[address]

    def release(self) -> None:
        """The run is over: what it looked up by id is not needed any more."""
        self.activations.clear()
        self.alive.clear()

    def value(self, tensor: Tensor) -> Value:
        value = self.values.get(id(tensor))
        if value is None:
            name = self.names.get(id(tensor))
            if name:
                return self.leaf(tensor, name)
            twin = self.twin(tensor)
            if twin is not None:  # a Parameter made of a result: the same memory, which no call shows
                value = self.values[id(tensor)] = self.values[id(self.__torch_dispatch__(torch.ops.aten.alias.default, (), (twin,)))]
                self.alive.append(tensor)
                return value
            value = Value(tuple(tensor.shape), leaf=f"<constant {len(self.leaves)}>")
            self.leaves[value.leaf] = value
            self.constants[value.leaf] = tensor
            self.keep(tensor, value)
        return value

    def twin(self, tensor: Tensor) -> Tensor | None:
        """The last tensor of the run that is the same memory, seen the same way."""
        if tensor.layout != torch.strided:
            return None
        address, offset = tensor.untyped_storage()._cdata, tensor.storage_offset()
        if address not in self.storages:
            return None
        for other in reversed(self.alive):
            if other.shape == tensor.shape and other.layout == torch.strided and other.untyped_storage()._cdata == address:
                if other.stride() == tensor.stride() and other.storage_offset() == offset and id(other) in self.values:
                    return other
        return None

    def place(self) -> tuple[str, int] | None:
        """File and line of the innermost frame of the model's own code: neither torch's nor this package's (a sibling such as torchvision's is)."""
        frame, inside = sys._getframe(2), self.inside
        while frame and frame.f_code is not self.caller:
            file = frame.f_code.co_filename
            if file not in inside:
                inside[file] = file.startswith((HERE, TORCH)) or file[:1] in ("", "<") or file == contextlib.__file__
            if not inside[file]:
                return file, frame.f_lineno
            frame = frame.f_back
        return None

    def line(self) -> str:
        return line(self.place())

    def resolved(self, func: Any) -> Known:
        op = resolve(func)
        ways = ((op.factory, self.made), (op.picks, self.picked), (op.assemble, self.assembled), (op.move, self.moved), (op.rule, self.ruled))
        carry = next((way for is_so, way in ways if is_so), self.met if op.pointwise else self.unknown)
        return Known(op, op.short, carry, op.shape if not op.draws else None, op.keeps_zero, op.whole and not op.strict, op.draws)

    def entered(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a module is called with for the first time."""
        if path not in self.given:
            self.given[path] = [(key, self.values.get(id(item))) for key, item in (*enumerate(args), *kwargs.items()) if isinstance(item, Tensor)]

    def here(self) -> tuple[str, int] | None:
        return self.place()

    def run(self, func: Any, known: Known, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """Execute: on the meta device as soon as one operand lies there."""
        if self.real:
            if known.draws:
                return self.drawn(func, args, kwargs)
            result = func(*args, **kwargs)
            return self.turn(known.op, args, kwargs, result) if self.turned and known.op.chooses_from is not None else result
        meta = [t.is_meta for t in given]
        if self.stale:
            meta = [empty or t.untyped_storage()._cdata in self.stale for empty, t in zip(meta, given, strict=True)]
        if True in meta:
            if known.op.inplace and not given[0].is_meta:
                self.stale.add(given[0].untyped_storage()._cdata)
                return given[0]
            if self.stale or False in meta:
                args, kwargs = self.emptied(args, kwargs)
            shaped = known.shape(*args, **kwargs) if known.shape is not None and False not in meta else None
            if shaped is not None:
                return shaped
            if "device" in kwargs:
                kwargs = {**kwargs, "device": META}
        elif str(kwargs.get("device", "")) == "meta":
            kwargs = {**kwargs, "device": given[0].device if given else CPU}
        return self.drawn(func, args, kwargs) if known.draws else func(*args, **kwargs)

    def drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Execute a call that draws random numbers; what changes them between two such calls is the model's code, which says what it wants."""
        self.dice = torch.get_rng_state()
        self.seeded = self.seeded or not torch.equal(self.dice, self.rest)
        result = func(*args, **kwargs)
        self.rest = torch.get_rng_state()
        return result

    def turn(self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """What would be chosen if the next entries of the axis were the largest."""
        assert op.chooses_from is not None
        choice: Any = op.chooses_from(*args, **kwargs)
        if choice is None:
            return result
        x, dim, _ = choice
        *values, at = (result,) if isinstance(result, Tensor) else result
        at.copy_((at + self.turned) % x.shape[dim])
        for largest in values:
            whole = at if at.ndim == x.ndim else at.unsqueeze(dim)
            largest.copy_(x.gather(dim, whole).reshape(largest.shape))
        return result

    @staticmethod
    def emptied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors on the meta device."""
        swap = lambda t: t if t.is_meta else t.to("meta")  # noqa: E731
        return replace(args, swap), replace(kwargs, swap)

    def see(self, items: Any, given: list[Tensor], held: list[Value]) -> list[Any]:
        """The arguments of a call with values for tensors; both are also noted in order."""
        seen = []
        for item in items:
            kind = type(item)
            if kind in PLAIN:
                seen.append(item)
            elif isinstance(item, Tensor):
                value = self.values.get(id(item))
                if value is None:
                    value = self.value(item)
                given.append(item)
                held.append(value)
                seen.append(value)
            elif kind is list or kind is tuple:
                seen.append(item if PLAIN.issuperset(map(type, item)) else kind(self.see(item, given, held)))
            else:
                given += tensors(item, Tensor)
                seen.append(replace(item, self.value))
                held += tensors(seen[-1])
        return seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        known = self.known.get(id(func))
        if known is None:
            known = self.known[id(func)] = self.resolved(func)
        if known.whole:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func is RESTRIDED and leaves_as_is(*args, **kwargs):
            return func(*args, **kwargs)
        given: list[Tensor] = []
        held: list[Value] = []
        seen = tuple(self.see(args, given, held))
        named = dict(zip(kwargs, self.see(kwargs.values(), given, held), strict=True)) if kwargs else kwargs
        result = self.run(func, known, args, kwargs, given)
        results = [result] if isinstance(result, Tensor) else tensors(result, Tensor)
        self.note(known, args, seen, named, given, held, results)
        return result

    def note(
        self, known: Known, args: tuple[Any, ...], seen: tuple[Any, ...], named: dict[Any, Any], given: list[Tensor], held: list[Value], results: list[Tensor]
    ) -> None:
        """Write a call down: what it was given (``args``; ``seen`` and ``named`` have values for tensors, ``given`` and ``held`` list both) and its results."""
        if not results:
            self.read.update(id(value) for value in held)
            if known.op.looks:
                self.looked.append((self.stack[-1] if self.stack else "", self.line()))
            return
        first_lock = len(self.labels.locks)
        shapes = [tuple(t.shape) for t in results]
        module, where = (self.stack[-1] if self.stack else ""), self.place()
        outs, reduces = self.fields(known, seen, named, held, shapes, module, where)
        if known.draws and (self.seeded or named.get("generator") is not None):
            self.hold_seeded(known, outs, module, where)
        number = len(self.nodes)
        zero = (known.zero and bool(held) and held[0].zero) or self.zeros
        values = [Value(s, f, zero, number) for s, f in zip(shapes, outs, strict=True)]
        for value, (choice, tally) in zip(values, self.numbering, strict=True) if self.numbering else ():
            value.numbers, value.tally = choice, tally
        for value, tensor in zip(values, results, strict=True) if self.numbering and self.real else ():
            if value.numbers is not None and tensor.numel() == 1:
                value.entry = int(tensor)
        self.numbering, self.zeros = [], False
        self.keep_results(known.op, args[0] if args else None, results, values)
        node = Node(known.op, seen, named, values, module, where, held, reduces, self.step)
        self.nodes.append(node)
        if self.amend is not None:
            self.amend(self, node, given, results)
        self.spans.append((first_lock, len(self.labels.locks)))

    def hold_seeded(self, known: Known, outs: list[Fields], module: str, where: Any) -> None:
        """Numbers of a seed that the code sets are a table: fewer of them would be others."""
        reason = self.labels.reason(Reason("random numbers of a seed that the code sets", known.name, module, where))
        for entries in (entries for out in outs for entries in out if entries.size > 1):
            self.labels.lock(entries, reason)

    def keep_results(self, op: Operation, first: Any, results: list[Tensor], values: list[Value]) -> None:
        """Keep the values of what a call returned; ``first`` is its first argument, which it may have written to."""
        for tensor, value in zip(results, values, strict=True):
            if tensor is first and op.writes:
                value.zero = False
            self.keep(tensor, value)
            if op.factory and op.unmade and not tensor.is_floating_point() and not tensor.is_meta:
                self.filled[id(value)] = tensor

    def fields(
        self, known: Known, args: tuple[Any, ...], kwargs: dict[str, Any], held: list[Value], shapes: list[Any], module: str, where: Any
    ) -> tuple[list[Fields], bool]:
        """What :meth:`carry` says; where the operation's own rule does not fit, its axes are locked, or it is an error if the rule is strict."""
        try:
            outs, reduces = self.carry(known, args, kwargs, held, shapes, module, where)
        except (GraphpruneError, ValueError, IndexError, KeyError, TypeError) as error:
            if known.op.strict:
                raise error if isinstance(error, BadRule) else BadRule(f"the rule of {known.op.name} does not fit: {error}") from error
            outs, reduces = self.refuse(known.name, held, len(shapes), module, where, f"not understood: {error}")
        if _fits(shapes, outs):
            return outs, reduces
        if known.op.strict:
            raise BadRule(f"the rule of {known.op.name} gives its results other shapes than {shapes}")
        whole = [Value(s, f) for s, f in zip(shapes, outs, strict=True)]
        return self.refuse(known.name, held + whole, len(shapes), module, where, "its rule does not fit")

    def carry(
        self, known: Known, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], module: str, where: Any
    ) -> tuple[list[Fields], bool]:
        """The fields of the results of a call, and whether an axis is reduced."""
        if not known.op.makes and not (known.op.factory and not given):
            for value in given:
                if value.fields or value.numbers is not None:  # a position has no axis that may be cut, but counts along one
                    break
            else:
                return [()] * len(shapes), False
        entered = any(value.leaf.startswith("<input ") for value in given)
        place = Reason("meets the model's input, which keeps its size" if entered else "meets an axis that keeps its size", known.name, module, where)
        reason = self.labels.reason(place)
        if self.choices:
            found = carried(self, known, args, kwargs, given, shapes, reason)
            if found is not None:
                return found
            if known.op.part:
                locked = len(self.labels.locks)
                outs = known.carry(known.op, args, kwargs, given, shapes, reason)
                self.labels.locks[locked:] = singled(self.choices, self.labels.locks[locked:])
                return outs
        if known.op.chooses_from is not None:
            found = chosen(self.labels, known.op, args, kwargs, place)
            if found:
                self.choices += found
                self.numbering = [(found[0] if place == len(shapes) - 1 else None, None) for place in range(len(shapes))]
        return known.carry(known.op, args, kwargs, given, shapes, reason)

    def made(
        self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], reason: int
    ) -> tuple[list[Fields], bool]:
        assert op.assemble is not None
        return op.assemble(self.labels, reason, shapes, *args, **kwargs), False

    def picked(
        self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], reason: int
    ) -> tuple[list[Fields], bool]:
        positions = picked(args, self.numbers)
        if not positions:
            literal = written(args, self.nodes, self.constants) if not kwargs else None
            if literal is None:
                return self.ruled(op, args, kwargs, given, shapes, reason)
            outs = take(self.labels, *literal, reason)
            self.box(outs)
            return outs, False
        x, dim, index = positions
        self.picks.setdefault(index.leaf, []).append((x, dim))
        outs = pick(self.labels, x, dim, index, self.numbers[index.leaf], reason)
        self.box(outs)
        return outs, False

    def assembled(
        self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], reason: int
    ) -> tuple[list[Fields], bool]:
        assert op.assemble is not None
        outs = op.assemble(self.labels, reason, shapes, *args, **kwargs)
        if op.copies:
            self.copied |= {id(field): field for field in outs[0][len(args[0].fields) :]}
        return outs, False

    def moved(
        self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], reason: int
    ) -> tuple[list[Fields], bool]:
        source, rest = args[0], args[1:]
        assert op.move is not None
        fields, moved = source.fields, [op.move(f, source.shape, shapes, *rest, **kwargs) for f in source.fields]
        if len(fields) > 1 and len(shapes) == 1:
            fields = self.labels.crossed(fields, [column[0] for column in moved])
            moved = moved if fields is source.fields else [op.move(f, source.shape, shapes, *rest, **kwargs) for f in fields]
        moved = self.copies(fields, moved, reason)
        outs = [tuple(column) for column in zip(*moved, strict=True)] or [()] * len(shapes)
        outs = [() if 0 in shape else held for held, shape in zip(outs, shapes, strict=True)]  # nothing is in it that could go
        if len(outs) == 1:
            outs = [merged(self.labels, outs[0], reason)]
        self.box(outs)
        if op.part:
            self.singled(source, outs, shapes, reason)
        return outs, False

    def ruled(
        self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], reason: int
    ) -> tuple[list[Fields], bool]:
        if op.aligned:
            aligned(args[:2], self.uses)
        described = op.describes(args, kwargs)
        if op.strict:
            check_results(op, described.text, shapes)
        outs, reduces = meet(self.labels, described, shapes, reason)
        weight = next((v for v in described.operands[1:] if isinstance(v, Value)), None)
        linear = weight is not None and (weight.zero or described.operands[0].zero) and "[" not in described.text
        return outs + [()] * (len(shapes) - len(outs)), reduces and not linear

    def met(
        self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], reason: int
    ) -> tuple[list[Fields], bool]:
        ranked = [v for v in given if v.shape] or given
        if len(ranked) == 1 and len(ranked[0].shape) == len(shapes[0]):
            return [ranked[0].fields for _ in shapes], False
        return meet(self.labels, pointwise(ranked, [len(s) for s in shapes]), shapes, reason)

    def unknown(
        self, op: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Value], shapes: list[Any], reason: int
    ) -> tuple[list[Fields], bool]:
        before = self.labels.reasons[reason]
        text, cure = (op.why, "") if op.why else ("no rule for this operation", f"describe it:\n{template(op)}")
        return self.refuse(op.short, given, len(shapes), before.module, before.where, text, cure)

    def refuse(self, name: str, given: list[Value], count: int, module: str, where: Any, text: str, cure: str = "") -> tuple[list[Fields], bool]:
        """Lock what an operation touches, and only that."""
        unknown = self.labels.reason(Reason(text, name, module, where, cure=cure))
        for value in given:
            for array in value.fields:
                self.labels.lock(array, unknown)
        return [()] * count, False

    def copies(self, before: Fields, moved: list[list[Any]], reason: int) -> list[list[Any]]:
        """A count of copies that comes to lie on one axis with what is copied (grouped-query heads): the count stays, so that the rest may go."""
        if self.labels.apart or not any(id(field) in self.copied for field in before):
            return moved
        kept = []
        for field, column in zip(before, moved, strict=True):
            if id(field) in self.copied:
                self.copied |= {id(array): array for array in column}
                others = [(f, c) for f, c in zip(before, moved, strict=True) if f is not field]
                if any(_cross(f, field) and not _cross(c[0], column[0]) for f, c in others):
                    self.labels.lock(field, reason)
                    continue
            kept.append(column)
        return kept

    def singled(self, source: Value, outs: list[Fields], shapes: list[Any], reason: int) -> None:
        """A part of length 1 names one position of an axis: that position stays."""
        if any(len(shape) != len(source.shape) for shape in shapes):
            return
        for fields, shape in zip(outs, shapes, strict=True):
            if 0 in shape:
                continue
            for before, after in zip(source.fields, fields, strict=True):
                lost = [a for a, n in enumerate(shape) if n == 1 and before.shape[a] > 1 and after.shape[a] == 1]
                if lost and not self.labels.is_repeated(before):  # over several axes: this position of one, the others may go as they like
                    dense = [a for a, n in enumerate(after.shape) if n > 1 or a in lost]
                    over = tuple(dense.index(a) for a in lost)
                    rest = after.reshape([after.shape[a] for a in dense])
                    self.labels.lock(rest.ravel() if rest.size == 1 else self.labels.marginal(rest, over).ravel(), reason)

    def box(self, outs: list[Fields]) -> None:
        for fields in outs:
            for array in fields:
                if max(array.shape) != array.size:  # more than one axis varies
                    self.labels.joint(array.reshape([n for n in array.shape if n > 1]))


def check_results(op: Operation, text: str, shapes: list[Any]) -> None:
    """A rule from outside has to describe every result with all its axes."""
    results = parse(text)[1]
    if len(results) != len(shapes):
        raise BadRule(
            at(text, result_place(text, len(shapes)), f"the rule of {op.name} describes {len(results)} results, the call returns {len(shapes)} tensors")
        )
    for number, (axes, size) in enumerate(zip(results, shapes, strict=True)):
        if len(axes) != len(size):
            raise BadRule(at(text, result_place(text, number), f"the rule of {op.name} names {len(axes)} axes of a result of shape {tuple(size)}"))


def aligned(operands: tuple[Any, ...], uses: Uses) -> None:
    """The kernel wants rows of a multiple of 16 bytes: a branch on the size, taken."""
    for value in operands:
        step = 16 // value.dtype.itemsize
        for dim in range(len(value.shape) - 2, len(value.shape)):
            if value.shape[dim] % step == 0 and any(field.shape[dim] > 1 for field in value.fields):
                uses.outcomes.append(Branch("==", ("%", ("dim", value, dim), step), 0, True))


def _cross(one: Array, two: Array) -> bool:
    """Do two fields vary along different axes?"""
    return not set(varying(one)) & set(varying(two))


def _fits(shapes: list[Any], outs: list[Fields]) -> bool:
    """Whether every field has length 1 or the tensor's own along each axis."""
    for size, fields in zip(shapes, outs, strict=True):
        for field in fields:
            if field.ndim != len(size):
                return False
            for n, whole in zip(field.shape, size, strict=True):
                if n != whole and n != 1:
                    return False
    return True
