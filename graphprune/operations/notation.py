"""Rules as text: which axes of an operation's tensors are one and the same, and what that asks of their labels.

``"b (g i) _, (g o) i _, (g o) -> b (g o) _"`` is a grouped convolution. ``(g i)`` is a row-major product, ``_`` an axis
that stays, ``[c]`` an axis with a statistic over it (*mixed*). An axis on both sides is *kept*, one on the left only is
*summed*. The engine is written once, here; an operation needs one line in ``rules.py``.

>>> parse("b (g i), g -> b [g]")[1]
((('b',), ('[g]',)),)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..errors import BadRule
from .labels import Array, Fields, Labels, compact, varying

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


class Expr(NamedTuple):
    """A rule's answer for one call: the text, the tensors it speaks of, and sizes that shapes do not tell."""

    text: str
    operands: tuple
    sizes: Mapping[str, int] = MappingProxyType({})


def expr(text: str, *operands: object, **sizes: int) -> Expr:
    return Expr(text, operands, sizes)


@lru_cache(maxsize=4096)
def parse(text: str) -> tuple[tuple[Axes, ...], tuple[Axes, ...]]:
    """The axes of every operand and of every result."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise BadRule(f"{text!r} has no '->'")
    return tuple(map(_axes, left.split(","))), tuple(map(_axes, right.split(",")))


def _axes(text: str) -> Axes:
    tokens = re.findall(r"\([^)]*\)|\S+", text)
    return tuple(tuple(token.strip("()").split()) for token in tokens)


@dataclass
class _Operand:
    sizes: dict[str, int]
    fields: dict[tuple[str, ...], Array]


def meet(labels: Labels, rule: Expr, results: Sequence[tuple[int, ...]], reason: int) -> tuple[list[Fields], bool]:
    """Apply a rule: join, lock and name slices; return the fields of every result, and whether an axis is reduced.

    Where every field varies over one axis, what is done depends on the form alone: it is worked out once, then replayed.
    """
    form = _form(rule, results)
    if form is None:
        return _meet(labels, rule, results, reason)
    if form not in _RECIPES:
        _RECIPES[form] = _recipe(rule, results)
    recipe = _RECIPES[form]
    return recipe.replay(labels, rule, reason) if recipe else _meet(labels, rule, results, reason)


_RECIPES: dict[tuple, Recipe | None] = {}


def _form(rule: Expr, results: Sequence[tuple[int, ...]]) -> tuple | None:
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
class Recipe:
    """What a rule does to fields over one axis, by their number: pairs to join, fields to lock, fields of the results."""

    joins: tuple[tuple[int, int], ...]
    locks: tuple[int, ...]
    outs: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
    reduces: bool

    def replay(self, labels: Labels, rule: Expr, reason: int) -> tuple[list[Fields], bool]:
        flat = [array if array.ndim == 1 else array.ravel() for value in rule.operands if value.__class__ is Value for array in value.fields]
        for left, right in self.joins:
            labels.join(flat[left], flat[right])
        for index in self.locks:
            labels.lock(flat[index], reason)
        return [tuple([flat[index] if len(view) == 1 else flat[index].reshape(view) for index, view in out]) for out in self.outs], self.reduces


class _Told(Exception):
    """The outcome depends on more than the form."""


class _Listener:
    """Stands in for the labels while a recipe is worked out on fields that are known by their memory."""

    def __init__(self) -> None:
        self.fields: dict[int, tuple[int, int]] = {}
        self.joins: list[tuple[int, int]] = []
        self.locks: list[int] = []

    def of(self, array: Array) -> int:
        index, size = self.fields.get(array.__array_interface__["data"][0], (-1, 0))
        if size != array.size:
            raise _Told
        return index

    def join(self, left: Array, right: Array) -> None:
        if left is not right:
            self.joins.append((self.of(left), self.of(right)))

    def lock(self, array: Array, reason: int) -> None:
        self.locks.append(self.of(array))

    def joint(self, *args: Any) -> None:
        raise _Told

    marginal = fresh = joint


def _recipe(rule: Expr, results: Sequence[tuple[int, ...]]) -> Recipe | None:
    listener, operands = _Listener(), []
    for value in rule.operands:
        if isinstance(value, Value):
            twins = tuple(np.arange(a.size, dtype=np.int32).reshape(a.shape) for a in value.fields)
            for twin in twins:
                listener.fields[twin.__array_interface__["data"][0]] = (len(listener.fields), twin.size)
            value = Value(value.shape, twins)
        operands.append(value)
    try:
        outs, reduces = _meet(listener, Expr(rule.text, tuple(operands), rule.sizes), results, 0)
        told = tuple(tuple((listener.of(f), tuple(-1 if n > 1 else 1 for n in f.shape)) for f in held) for held in outs)
    except _Told:
        return None
    if any(view.count(-1) != 1 for held in told for _, view in held):
        return None
    return Recipe(tuple(listener.joins), tuple(listener.locks), told, reduces)


def _meet(labels: Labels, rule: Expr, results: Sequence[tuple[int, ...]], reason: int) -> tuple[list[Fields], bool]:
    lefts, rights = parse(rule.text)
    operands, order = [], {}
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
    _join_overlaps(labels, shared)
    mixed = any(token[0] == "[" for axes in lefts + rights for dim in axes for token in dim)
    reduces = bool(shared) and (mixed or any(not set(names) <= kept for names in shared))
    return [_carry(labels, shared, *out) for out in outs], reduces


def _operand(labels: Labels, axes: Axes, value: Value, sizes: dict, order: dict, reason: int) -> _Operand:
    if len(axes) != len(value.shape):
        raise BadRule(f"{len(axes)} axes named, the tensor has shape {tuple(value.shape)}")
    names, lengths = factors(axes, value.shape, sizes)
    found: dict[tuple[str, ...], Array] = {}
    for array in value.fields:
        shape = []
        for dim, group in enumerate(axes):
            inner = [lengths[name] for name in _names(group, dim)]
            shape += inner if array.shape[dim] > 1 else [1] * len(inner)
        split = compact(array.reshape(shape)) if len(shape) != array.ndim else array
        over = varying(split)
        if not over:
            continue
        split = split.reshape([split.shape[axis] for axis in over])
        held = tuple(names[axis] for axis in over)
        split, held = _drop_fixed(labels, split, held, reason)
        if not held:
            continue
        for name in held:
            order.setdefault(name, len(order))
        by = sorted(range(len(held)), key=lambda i: order[held[i]])
        if by != list(range(len(held))):
            split, held = split.transpose(by), tuple(held[i] for i in by)
        if len(held) > 1:
            labels.joint(split)
        if held in found:
            labels.join(found[held], split)
        found[held] = split
    real = {name: size for name, size in lengths.items() if size > 1 and name[0] != "_"}
    return _Operand(real, found)


def _names(group: tuple[str, ...], dim: int) -> list[str]:
    return [f"_{dim}" if name == "_" else name.strip("[]") for name in group]


def factors(axes: Axes, shape: tuple[int, ...], sizes: dict) -> tuple[list[str], dict[str, int]]:
    """The names of all factors of a tensor's axes, in order, and their lengths."""
    names, lengths = [], {}
    for dim, (group, size) in enumerate(zip(axes, shape, strict=True)):
        inner = _names(group, dim)
        known = [sizes.get(name) for name in inner]
        if known.count(None) > 1:
            raise BadRule(f"the sizes of {inner} are not known")
        rest = size // int(np.prod([k for k in known if k is not None] or [1])) if None in known else 1
        for name, value in zip(inner, known, strict=True):
            names.append(name)
            lengths[name] = rest if value is None else value
    return names, lengths


def _drop_fixed(labels: Labels, array: Array, names: tuple[str, ...], reason: int) -> tuple[Array, tuple[str, ...]]:
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
    return first.reshape([array.shape[axis] for axis in keep]), tuple(names[axis] for axis in keep)


def _over(labels: Labels, array: Array, names: tuple[str, ...], onto: Sequence[str], carried: bool = False) -> Array:
    """The labels of the slices of a field along the axes ``onto``, in the field's own order of axes."""
    if len(onto) == len(names):
        return array
    return labels.marginal(array, tuple(i for i, name in enumerate(names) if name in onto), carried)


def _lock_uncovered(labels: Labels, operand: _Operand, shared: dict, reason: int) -> None:
    for names, array in list(shared.items()):
        mine = [name for name in names if name in operand.sizes]
        covered = {name for held in operand.fields for name in held}
        missing = [name for name in mine if name not in covered]
        if missing:
            labels.lock(_over(labels, array, names, missing), reason)
        if len(missing) == len(names):  # it stays whole from here on: nothing more to carry
            del shared[names]


def _join_overlaps(labels: Labels, shared: dict) -> None:
    entries = list(shared.items())
    for index, (names, array) in enumerate(entries):
        for others, other in entries[:index]:
            both = [name for name in names if name in others]
            if both:
                labels.join(_over(labels, array, names, both), _over(labels, other, others, both))


def _result(axes: Axes, shape: tuple[int, ...], sizes: dict, order: dict) -> tuple:
    names = [[n for n in _names(group, dim)] for dim, group in enumerate(axes)]
    return [n for group in names for n in group if n[0] not in "_1"], names, shape


def _carry(labels: Labels, shared: dict, kept: list[str], dims: list[list[str]], shape: tuple[int, ...]) -> Fields:
    best: dict[tuple[str, ...], Array] = {}
    for names, array in shared.items():
        onto = tuple(name for name in names if name in kept)
        if onto:
            best.setdefault(onto, _over(labels, array, names, onto, carried=True))
    fields = []
    for names, array in best.items():
        if any(set(names) < set(other) for other in best):
            continue
        flat = [name for group in dims for name in group]
        spread = array.transpose(sorted(range(len(names)), key=lambda i: flat.index(names[i])))
        sizes = dict(zip(names, array.shape, strict=True))
        spread = spread.reshape([sizes.get(name, 1) for name in flat])
        fields.append(_merge(spread, flat, dims, shape))
    return tuple(fields)


def _merge(array: Array, flat: list[str], dims: list[list[str]], shape: tuple[int, ...]) -> Array:
    if len(flat) == len(shape):
        return array
    full, out, at = list(array.shape), [], 0
    for dim, group in enumerate(dims):
        part = full[at : at + len(group)]
        out.append(1 if all(n == 1 for n in part) else shape[dim])
        if out[-1] > 1 and len(group) > 1:
            known = int(np.prod(part))
            for i, n in enumerate(part):
                if n == 1:
                    full[at + i] = shape[dim] // known
        at += len(group)
    return np.ascontiguousarray(np.broadcast_to(array, full)).reshape(out)
