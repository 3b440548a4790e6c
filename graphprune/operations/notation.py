# pyright: strict, reportUnnecessaryIsInstance=false
"""Rules as text: which axes of an operation's tensors are one and the same, and what that asks of their labels.

``"b (g i) _, (g o) i _, (g o) -> b (g o) _"`` is a grouped convolution. ``(g i)`` is a row-major product, ``_`` an axis
that stays, ``[c]`` an axis with a statistic over it (*mixed*). An axis on both sides is *kept*, one on the left only is
*summed*. A name such as ``_t`` stays too, and is counted where products are counted (the taps of a kernel). The engine is written once, here.

>>> parse("b (g i), g -> b [g]")[1]
((('b',), ('[g]',)),)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..errors import BadRule
from .labels import Array, Coupling, Fields, compact, varying

Axes = tuple[tuple[str, ...], ...]


@dataclass(slots=True)
class Value:
    """What is known of one tensor of the run: its shape, its fields, and where it came from.

    ``zero``: removed entries are exactly zero once the parameters are (a parameter, or a view of one). ``storage`` is
    the same for tensors that share their memory; ``order`` lists the axes from the outermost in memory to the innermost
    when that is not their own order (channels last, a transposed weight).
    """

    shape: tuple[int, ...]
    fields: Fields = ()
    zero: bool = False
    node: int = -1
    leaf: str = ""
    dtype: Any = None
    storage: int = -1
    order: tuple[int, ...] | None = None
    entry: int = -1  # which position it is, where it is a single one and the run has values
    numbers: Any = None  # what its entries are positions of (:mod:`graphprune.tracing.choices`)
    tally: Any = None  # what its entries count: for each position that was chosen from, how often that was chosen

    def __repr__(self) -> str:
        origin = self.leaf or (f"call {self.node}" if self.node >= 0 else "")
        return f"Value({'x'.join(map(str, self.shape)) or 'scalar'}{f', {origin}' if origin else ''})"


class Expr(NamedTuple):
    """A rule's answer for one call: the text, the tensors it speaks of, and sizes that shapes do not tell."""

    text: str
    operands: tuple[Any, ...]
    sizes: Mapping[str, int] = MappingProxyType({})


def expr(text: str, *operands: object, **sizes: int) -> Expr:
    """A rule's answer for one call: the text, one tensor (or None, where the call has none) for each operand, and sizes that shapes do not tell.

    Raises :class:`~graphprune.errors.BadRule`, which quotes the text and the place in it, where the text cannot be read or operands are missing.

    >>> expr("n i, i o -> n o", Value((2, 3)), Value((3, 4))).text
    'n i, i o -> n o'
    """
    lefts, _ = parse(text)
    if len(lefts) != len(operands):
        raise BadRule(unmatched(text, len(operands), "the rule"))
    return Expr(text, operands, sizes)


def at(text: str, place: int, problem: str) -> str:
    """A message that shows the place in a rule's text.

    >>> print(at("n (i", 2, "this bracket is not closed"))
    this bracket is not closed:
      n (i
        ^
    """
    return f"{problem}:\n  {text}\n  {' ' * place}^"


@lru_cache(maxsize=4096)
def parse(text: str) -> tuple[tuple[Axes, ...], tuple[Axes, ...]]:
    """The axes of every operand and of every result; raises :class:`~graphprune.errors.BadRule` with the place that cannot be read."""
    sides = tuple([tuple([axes for axes, _ in side]) for side in _sides(text)])
    return sides[0], sides[1]


Placed = list[tuple[Axes, list[int]]]  # the axes of a tensor, and where in the text each of them stands


def _sides(text: str) -> tuple[Placed, Placed]:
    if not isinstance(text, str):
        raise BadRule(f"a rule is a text such as 'n i, i o -> n o', not {text!r}")
    left, arrow, right = text.partition("->")
    if not arrow:
        raise BadRule(at(text, len(text), "a rule needs one '->' between operands and results"))
    if "->" in right:
        raise BadRule(at(text, text.rindex("->"), "a rule has one '->'"))
    return _tensors(text, left, 0), _tensors(text, right, len(left) + 2)


def _tensors(text: str, side: str, start: int) -> Placed:
    placed: Placed = []
    for part in side.split(","):
        placed.append(_axes(text, part, start))
        start += len(part) + 1
    return placed


TOKEN = re.compile(r"[()]|[^\s()]+")
NAME = re.compile(r"_|1|_?[A-Za-z][A-Za-z0-9]*|\[[A-Za-z][A-Za-z0-9]*\]")


def _axes(text: str, part: str, start: int) -> tuple[Axes, list[int]]:
    dims: list[tuple[str, ...]] = []
    places: list[int] = []
    seen: set[str] = set()
    opened = -1
    inner: list[str] = []
    for token in TOKEN.finditer(part):
        word, place = token[0], start + token.start()
        if word == "(":
            if opened >= 0:
                raise BadRule(at(text, place, "a bracket inside a bracket"))
            opened, inner = place, []
        elif word == ")":
            if opened < 0:
                raise BadRule(at(text, place, "this bracket was not opened"))
            dims.append(tuple(inner))
            places.append(opened)
            opened = -1
        else:
            _check_name(text, word, place, seen)
            if opened >= 0:
                inner.append(word)
            else:
                dims.append((word,))
                places.append(place)
    if opened >= 0:
        raise BadRule(at(text, opened, "this bracket is not closed"))
    return tuple(dims), places


def _check_name(text: str, word: str, place: int, seen: set[str]) -> None:
    if not NAME.fullmatch(word):
        what = "a number says nothing about an axis" if word.isdigit() else f"{word!r} is no name of an axis"
        raise BadRule(at(text, place, f"{what}; write a letter or a word, [name] for one with a statistic over it, _ for one that stays, 1 for length 1"))
    name = word.strip("[]")
    if name in seen:
        raise BadRule(at(text, place, f"{name!r} names two axes of one tensor; write _ for axes that must keep their positions"))
    if name not in "_1":
        seen.add(name)


def unmatched(text: str, count: int, where: str) -> str:
    """That a rule describes more operands, or fewer, than tensors are given."""
    lefts, _ = _sides(text)
    missing = lefts[count][1] if count < len(lefts) else []
    return at(text, missing[0] if missing else text.index("->"), f"{where} describes {len(lefts)} operands, and tensors are given for {count}")


def result_place(text: str, number: int) -> int:
    """Where the axes of a result begin in a rule's text."""
    _, rights = _sides(text)
    places = rights[number][1] if number < len(rights) else []
    return places[0] if places else text.index("->")


def checked(rule: object, where: str) -> Expr:
    """A rule's answer that fits the tensors it speaks of; raises :class:`~graphprune.errors.BadRule` with the text and the place that does not."""
    if not isinstance(rule, Expr):
        raise BadRule(f"{where} returned {rule!r}; return graphprune.expr(text, *tensors), as in graphprune.expr('n i, i o -> n o', x, weight)")
    lefts, rights = _sides(rule.text)
    if len(lefts) != len(rule.operands):
        raise BadRule(unmatched(rule.text, len(rule.operands), where))
    lengths = dict(rule.sizes)
    for number, ((axes, places), value) in enumerate(zip(lefts, rule.operands, strict=True)):
        if isinstance(value, Value):
            _check_operand(rule, axes, places, value, lengths, where)
        elif value is not None:
            raise BadRule(at(rule.text, (places or [0])[0], f"operand {number} of {where} is {value!r} and no tensor"))
    known = {name.strip("[]") for axes, _ in lefts for group in axes for name in group} | set(rule.sizes)
    for axes, places in rights:
        for group, place in zip(axes, places, strict=True):
            unknown = [name for name in group if name[0] not in "_1" and name.strip("[]") not in known]
            if unknown:
                raise BadRule(at(rule.text, place, f"{where} makes an axis {unknown[0]!r} that no operand has; write _ for one that stays"))
    return rule


def _check_operand(rule: Expr, axes: Axes, places: list[int], value: Value, lengths: dict[str, int], where: str) -> None:
    """Whether a tensor has the axes that it should have; ``lengths`` notes how long each is, for the operands behind."""
    if len(axes) != len(value.shape):
        raise BadRule(at(rule.text, (places or [0])[0], f"{where} names {len(axes)} axes here, the tensor has shape {tuple(value.shape)}"))
    for group, size, place in zip(axes, value.shape, places, strict=True):
        names = [name.strip("[]") for name in group]
        sizes = [rule.sizes.get(name) for name in names]
        if sizes.count(None) > 1:
            raise BadRule(at(rule.text, place, f"{where} has to say all sizes but one in here: graphprune.expr(text, *tensors, {names[0]}=…)"))
        rest = math.prod([n for n in sizes if n is not None])
        if not rest or size % rest or (None not in sizes and size != rest):
            raise BadRule(at(rule.text, place, f"{where} takes an axis of length {size} apart into factors of {rest}"))
        for name, known in zip(names, sizes, strict=True):
            length = size // rest if known is None else known
            before = lengths.setdefault(name, length) if name not in "_1" else length
            if before != length and 1 not in (before, length):
                raise BadRule(at(rule.text, place, f"{name!r} is an axis of length {before} elsewhere in {where}, and of length {length} here"))


@dataclass
class _Operand:
    sizes: dict[str, int]
    fields: dict[tuple[str, ...], Array]


def meet(labels: Coupling, rule: Expr, results: Sequence[tuple[int, ...]], reason: int) -> tuple[list[Fields], bool]:
    """Apply a rule: join, lock and name slices; return the fields of every result, and whether an axis is reduced.

    Where every field varies over one axis, what is done depends on the form alone: it is worked out once, then replayed.
    """
    form = _form(rule, results)
    if form is None:
        return _meet(labels, rule, results, reason)
    outcome = _OUTCOMES.get(form, _UNKNOWN)
    if outcome is _UNKNOWN:
        if len(_OUTCOMES) >= MOST_OUTCOMES:  # forms of earlier models; those that are needed are soon there again
            _OUTCOMES.clear()
        outcome = _OUTCOMES[form] = _outcome(rule, results)
    return outcome.replay(labels, rule, reason) if outcome else _meet(labels, rule, results, reason)


_OUTCOMES: dict[tuple[Any, ...], Any] = {}  # by form, what a rule does; None where that depends on the labels
_UNKNOWN, MOST_OUTCOMES = object(), 8192


def _form(rule: Expr, results: Sequence[tuple[int, ...]]) -> tuple[Any, ...] | None:
    """All that the outcome of a rule depends on, or None where it depends on the labels themselves."""
    form: list[Any] = [rule.text, len(results)]
    sizes = rule.sizes.values()
    for value in rule.operands:
        if value.__class__ is not Value:
            form.append(None)
            continue
        whole = value.shape
        for array in value.fields:
            size = array.size
            if size < 2 or size not in array.shape or array.item(0) == array.item(-1):
                return None
            form.append(array.shape.index(size))
        form.append(len(whole))
        if 1 in whole:
            form.append(tuple([n == 1 for n in whole]))
        for size in sizes:
            form.append((size == 1, *[n == size for n in whole]))
    return tuple(form)


@dataclass(frozen=True)
class Outcome:
    """What a rule does to fields over one axis, by their number: pairs to join, fields to lock, fields of the results."""

    joins: tuple[tuple[int, int], ...]
    locks: tuple[int, ...]
    outs: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    reduces: bool

    def replay(self, labels: Coupling, rule: Expr, reason: int) -> tuple[list[Fields], bool]:
        flat = [array if array.ndim == 1 else array.ravel() for value in rule.operands if value.__class__ is Value for array in value.fields]
        for left, right in self.joins:
            labels.join(flat[left], flat[right])
        for index in self.locks:
            labels.lock(flat[index], reason)
        return [tuple([flat[index] if len(view) == 1 else flat[index].reshape(view) for index, view in out]) for out in self.outs], self.reduces


class _BeyondForm(Exception):
    """The outcome depends on more than the form."""


class _Listener:
    """Stands in for the labels while an outcome is worked out on fields that are known by their memory."""

    def __init__(self) -> None:
        self.fields: dict[int, tuple[int, int]] = {}
        self.joins: list[tuple[int, int]] = []
        self.locks: list[int] = []

    def of(self, array: Array) -> int:
        index, size = self.fields.get(array.__array_interface__["data"][0], (-1, 0))
        if size != array.size:
            raise _BeyondForm
        return index

    def join(self, left: Array, right: Array) -> None:
        if left is not right:
            self.joins.append((self.of(left), self.of(right)))

    def lock(self, labels: Array, reason: int) -> None:
        self.locks.append(self.of(labels))

    def joint(self, array: Array) -> None:
        raise _BeyondForm

    def marginal(self, array: Array, axes: tuple[int, ...], carried: bool = False) -> Array:
        raise _BeyondForm

    def fresh(self, size: int) -> Array:
        raise _BeyondForm


def _outcome(rule: Expr, results: Sequence[tuple[int, ...]]) -> Outcome | None:
    listener = _Listener()
    operands: list[Any] = []
    for value in rule.operands:
        if isinstance(value, Value):
            twins = tuple(np.reshape(np.arange(a.size, dtype=np.int32), a.shape) for a in value.fields)
            for twin in twins:
                listener.fields[twin.__array_interface__["data"][0]] = (len(listener.fields), twin.size)
            value = Value(value.shape, twins)
        operands.append(value)
    try:
        outs, reduces = _meet(listener, Expr(rule.text, tuple(operands), rule.sizes), results, 0)
        views = tuple(tuple((listener.of(f), tuple(-1 if n > 1 else 1 for n in f.shape)) for f in fields) for fields in outs)
    except _BeyondForm:
        return None
    if any(view.count(-1) != 1 for fields in views for _, view in fields):
        return None
    return Outcome(tuple(listener.joins), tuple(listener.locks), views, reduces)


def _meet(labels: Coupling, rule: Expr, results: Sequence[tuple[int, ...]], reason: int) -> tuple[list[Fields], bool]:
    lefts, rights = parse(rule.text)
    operands: list[_Operand] = []
    order: dict[str, int] = {}
    for axes, value in zip(lefts, rule.operands, strict=True):
        if isinstance(value, Value):
            operands.append(_operand(labels, axes, value, rule.sizes, order, reason))
    shared: dict[tuple[str, ...], Array] = {}
    for operand in operands:
        for names, array in operand.fields.items():
            if names in shared:
                labels.join(shared[names], array)
            else:
                shared[names] = array
    for operand in operands:
        _lock_uncovered(labels, operand, shared, reason)
    outs = [_result(axes, shape, rule.sizes, order) for axes, shape in zip(rights, results, strict=False)]
    kept = {name for names, *_ in outs for name in names}
    _make_whole(labels, rights, {name: size for operand in operands for name, size in operand.sizes.items()}, shared)
    _join_overlaps(labels, shared)
    mixed = any(token[0] == "[" for axes in lefts + rights for dim in axes for token in dim)
    reduces = bool(shared) and (mixed or any(not set(names) <= kept for names in shared))
    return [_carry(labels, shared, *out) for out in outs], reduces


def _operand(labels: Coupling, axes: Axes, value: Value, sizes: Mapping[str, int], order: dict[str, int], reason: int) -> _Operand:
    if len(axes) != len(value.shape):
        raise BadRule(f"{len(axes)} axes named, the tensor has shape {tuple(value.shape)}")
    names, lengths = factors(axes, value.shape, sizes)
    fields: dict[tuple[str, ...], Array] = {}
    for array in value.fields:
        shape: list[int] = []
        for dim, group in enumerate(axes):
            inner = [lengths[name] for name in _names(group, dim)]
            shape += inner if array.shape[dim] > 1 else [1] * len(inner)
        split = compact(np.reshape(array, shape)) if len(shape) != array.ndim else array
        over = varying(split)
        if not over:
            continue
        split = np.reshape(split, [split.shape[axis] for axis in over])
        carried = tuple(names[axis] for axis in over)
        split, carried = _drop_fixed(labels, split, carried, reason)
        if not carried:
            continue
        for name in carried:
            order.setdefault(name, len(order))
        by = sorted(range(len(carried)), key=lambda i: order[carried[i]])
        if by != list(range(len(carried))):
            split, carried = np.transpose(split, by), tuple(carried[i] for i in by)
        if len(carried) > 1:
            labels.joint(split)
        if carried in fields:
            labels.join(fields[carried], split)
        fields[carried] = split
    real = {name: size for name, size in lengths.items() if size > 1 and name[0] != "_"}
    return _Operand(real, fields)


def _names(group: tuple[str, ...], dim: int) -> list[str]:
    return [f"_{dim}" if name == "_" else name.strip("[]") for name in group]


def factors(axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[list[str], dict[str, int]]:
    """The names of all factors of a tensor's axes, in order, and their lengths."""
    names: list[str] = []
    lengths: dict[str, int] = {}
    for dim, (group, size) in enumerate(zip(axes, shape, strict=True)):
        inner = _names(group, dim)
        known = [sizes.get(name) for name in inner]
        if known.count(None) > 1:
            raise BadRule(f"the sizes of {inner} are not known")
        rest = size // math.prod([k for k in known if k is not None]) if None in known else 1
        for name, value in zip(inner, known, strict=True):
            names.append(name)
            lengths[name] = rest if value is None else value
    return names, lengths


def solved(rule: Expr, shapes: Sequence[Sequence[int] | None]) -> dict[str, int]:
    """The sizes that a rule was given, as they are for operands of other shapes.

    Where an axis is the factor times one that stands alone elsewhere, that says it; else it stays if it still divides its axes, and is 1 if not.

    >>> solved(Expr("b (g i), (g o) i -> b (g o)", (None, None), {"g": 4}), [(1, 6), (8, 3)])
    {'g': 2}
    """
    lefts = parse(rule.text)[0]
    pairs = [(group, size) for axes, shape in zip(lefts, shapes, strict=True) if shape is not None for group, size in zip(axes, shape, strict=True)]
    alone = {group[0].strip("[]"): size for group, size in pairs if len(group) == 1}
    lengths: dict[str, int] = {}
    for name, before in rule.sizes.items():
        rests = [(size, [other.strip("[]") for other in group if other != name]) for group, size in pairs if name in group]
        quotients = [size // alone[rest[0]] for size, rest in rests if len(rest) == 1 and alone.get(rest[0])]
        lengths[name] = quotients[0] if quotients else before if all(size % before == 0 for size, _ in rests) else 1
    return lengths


def _drop_fixed(labels: Coupling, array: Array, names: tuple[str, ...], reason: int) -> tuple[Array, tuple[str, ...]]:
    fixed = [axis for axis, name in enumerate(names) if name[0] == "_"]
    if not fixed:
        return array, names
    if len(fixed) == len(names):
        labels.lock(array, reason)
        return array, ()
    first = array
    for axis in fixed:
        first = first.take([0], axis=axis)
    labels.join(first, array)
    keep = [axis for axis in range(len(names)) if axis not in fixed]
    return np.reshape(first, [array.shape[axis] for axis in keep]), tuple(names[axis] for axis in keep)


def _over(labels: Coupling, array: Array, names: tuple[str, ...], onto: Sequence[str], carried: bool = False) -> Array:
    """The labels of the slices of a field along the axes ``onto``, in the field's own order of axes."""
    if len(onto) == len(names):
        return array
    return labels.marginal(array, tuple(i for i, name in enumerate(names) if name in onto), carried)


def _lock_uncovered(labels: Coupling, operand: _Operand, shared: dict[Any, Any], reason: int) -> None:
    for names, array in list(shared.items()):
        named = [name for name in names if name in operand.sizes]
        covered = {name for axes in operand.fields for name in axes}
        missing = [name for name in named if name not in covered]
        if missing:
            labels.lock(_over(labels, array, names, missing), reason)
        if len(missing) == len(names):  # it stays whole from here on: nothing more to carry
            del shared[names]


def _make_whole(labels: Coupling, rights: tuple[Axes, ...], sizes: Mapping[str, int], shared: dict[Any, Any]) -> None:
    """An axis of a result whose factors come from different operands gets labels of its own: a position of it is all of its factors at once."""
    for group in [group for axes in rights for group in axes if len(group) > 1]:
        names = tuple(name for name in _names(group, 0) if name in sizes)
        parts = [set(other).intersection(names) for other in shared]
        if len(names) > 1 and set(names) == set().union(*parts) and all(len(part) < len(names) for part in parts):
            shared[names] = np.reshape(labels.fresh(math.prod(sizes[name] for name in names)), [sizes[name] for name in names])
            labels.joint(shared[names])


def _join_overlaps(labels: Coupling, shared: dict[Any, Any]) -> None:
    entries = list(shared.items())
    for index, (names, array) in enumerate(entries):
        for others, other in entries[:index]:
            both = [name for name in names if name in others]
            if both:
                labels.join(_over(labels, array, names, both), _over(labels, other, others, both))


def _result(axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int], order: dict[str, int]) -> tuple[Any, ...]:
    names = [[n for n in _names(group, dim)] for dim, group in enumerate(axes)]
    return [n for group in names for n in group if n[0] not in "_1"], names, shape


def _carry(labels: Coupling, shared: dict[Any, Any], kept: list[str], dims: list[list[str]], shape: tuple[int, ...]) -> Fields:
    best: dict[tuple[str, ...], Array] = {}
    for names, array in shared.items():
        onto = tuple(name for name in names if name in kept)
        if onto:
            best.setdefault(onto, _over(labels, array, names, onto, carried=True))
    fields: list[Array] = []
    for names, array in best.items():
        if any(set(names) < set(other) for other in best):
            continue
        flat = [name for group in dims for name in group]
        spread = np.transpose(array, sorted(range(len(names)), key=lambda i: flat.index(names[i])))
        sizes = dict(zip(names, array.shape, strict=True))
        spread = np.reshape(spread, [sizes.get(name, 1) for name in flat])
        fields.append(_merge(spread, flat, dims, shape))
    return tuple(fields)


def _merge(array: Array, flat: list[str], dims: list[list[str]], shape: tuple[int, ...]) -> Array:
    if len(flat) == len(shape):
        return array
    full, at = list(array.shape), 0
    out: list[int] = []
    for dim, group in enumerate(dims):
        part = full[at : at + len(group)]
        out.append(1 if all(n == 1 for n in part) else shape[dim])
        if out[-1] > 1 and len(group) > 1:
            known = int(np.prod(part))
            for i, n in enumerate(part):
                if n == 1:
                    full[at + i] = shape[dim] // known
        at += len(group)
    return np.reshape(np.ascontiguousarray(np.broadcast_to(array, full)), out)
