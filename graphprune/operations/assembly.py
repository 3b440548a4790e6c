"""Operations that put tensors together or take single positions out: joining, picking and padding along an axis.

They read and make labels, so they are neither pure movement nor a line of text.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BadRule
from .labels import Array, Fields, Labels, compact, varying
from .notation import Value, expr, meet
from .record import LETTERS, assemble, describe, pointwise


def free(labels: Labels, shape: tuple[int, ...], axes: range | list[int]) -> Fields:
    """Labels for axes along which a tensor is uniform: it can be cut there, whatever is asked of it."""
    fields = []
    for axis in axes:
        size = shape[axis]
        if size > 1:
            made = labels.fresh(size)
            if len(shape) > 1:
                view = [1] * len(shape)
                view[axis] = size
                made = made.reshape(view)
            fields.append(made)
    return tuple(fields)


def copies(labels: Labels, shape: tuple[int, ...], axes: list[int]) -> Fields:
    """Free labels for axes along which one thing is repeated."""
    start = labels.count
    fields = free(labels, shape, axes)
    if fields:
        labels.repeated.append((start, labels.count))
    return fields


def merged(labels: Labels, fields: Fields, reason: int) -> Fields:
    """Without the numbers of copies that now share an axis with what was copied: so many copies stay, of whatever stays.

    (Heads of keys and values, repeated for the queries of their group: the heads go, each with all its copies.)
    ``labels.apart`` turns that round: what was copied stays whole, and the same copies of everything may go (queries within their group).
    """
    if len(fields) < 2 or not labels.repeated:
        return fields
    if labels.apart:
        return without_copied(labels, fields, reason)
    remaining = []
    for array in fields:
        over = varying(array)
        shared = len(over) == 1 and any(other is not array and other.shape[over[0]] > 1 for other in fields)
        if shared and labels.is_repeated(array):
            labels.lock(array, reason)
        else:
            remaining.append(array)
    return tuple(remaining)


def without_copied(labels: Labels, fields: Fields, reason: int) -> Fields:
    """The fields with entries of their own for every copy, of which those with one number go together; what was copied stays whole."""
    numbers = {varying(array)[0]: array for array in fields if len(varying(array)) == 1 and labels.is_repeated(array)}
    left, used = [], set()
    for array in fields:
        over = varying(array)
        shared = next((axis for axis in over if axis in numbers and array is not numbers[axis]), None)
        if shared is None:
            left.append(array)
            continue
        labels.lock(array, reason)
        own = labels.fresh(array.size).reshape(array.shape)
        labels.copied.append(own)
        dense = own.reshape([array.shape[axis] for axis in over])
        for index, axis in enumerate(over):
            names = labels.marginal(dense, (index,)).ravel()
            if axis == shared:
                labels.join(names, numbers[axis].ravel())
            else:
                labels.lock(names, reason)
        left.append(own)
        used.add(id(numbers[shared]))
    return tuple(array for array in left if id(array) not in used)


@assemble("expand", copies=True, makes=True)
def expand(labels: Labels, reason: int, outs: list[Any], x: Value, sizes, **kwargs) -> list[Fields]:
    new = len(outs[0]) - len(x.shape)
    grown = [a for a in range(len(outs[0])) if a < new or x.shape[a - new] != outs[0][a]]
    fields = tuple(f.reshape((1,) * new + f.shape) for f in x.fields)
    return [fields + copies(labels, outs[0], grown)]


@assemble("repeat", makes=True)
def repeat(labels: Labels, reason: int, outs: list[Any], x: Value, times) -> list[Fields]:
    new = len(times) - len(x.shape)
    fields = []
    for field in x.fields:
        wide = field.reshape((1,) * new + field.shape)
        fields.append(np.tile(wide, [n if s > 1 else 1 for n, s in zip(times, wide.shape, strict=True)]))
    grown = [a for a in range(len(times)) if a < new or x.shape[a - new] == 1]
    return [tuple(fields) + copies(labels, outs[0], grown)]


def _without(x: Value, axis: int, labels: Labels, reason: int, only: int | None = None) -> Fields:
    """The fields without one axis, all positions of which stay (or one of them alone)."""
    stays = slice(None) if only is None else only
    fields = []
    for field in x.fields:
        if field.shape[axis] > 1:
            if len(varying(field)) == 1:
                labels.lock(field.ravel()[stays], reason)
                continue
            over = varying(field)
            at = over.index(axis)
            dense = field.reshape([field.shape[a] for a in over])
            labels.lock(labels.marginal(dense, (at,))[stays], reason)
        fields.append(field)
    return tuple(fields)


@assemble("select", part=True, any_size=lambda x, dim, index: index in (0, -1))
def select(labels: Labels, reason: int, outs: list[Any], x: Value, dim: int, index: int) -> list[Fields]:
    dim %= len(x.shape)
    # The first stays the first and the last the last whatever goes between; of copies one of which is looked at, all stay.
    ends = index in (0, -1) and not any(field.shape[dim] > 1 and labels.is_repeated(field) for field in x.fields)
    fields = _without(x, dim, labels, reason, index if ends else None)
    return [tuple(compact(f.take(index if f.shape[dim] > 1 else 0, axis=dim)) for f in fields)]


@assemble("unbind", part=True)
def unbind(labels: Labels, reason: int, outs: list[Any], x: Value, dim: int = 0) -> list[Fields]:
    dim %= len(x.shape)
    fields = _without(x, dim, labels, reason)
    return [tuple(compact(f.take(i if f.shape[dim] > 1 else 0, axis=dim)) for f in fields) for i in range(len(outs))]


@assemble("stack")
def stack(labels: Labels, reason: int, outs: list[Any], tensors: list[Any], dim: int = 0) -> list[Fields]:
    rank = len(tensors[0].shape)
    (fields,), _ = meet(labels, pointwise(tensors, [rank]), [tensors[0].shape], reason)
    return [tuple(np.expand_dims(f, dim % (rank + 1)) for f in fields)]


@assemble("cat", "concatenate")
def cat(labels: Labels, reason: int, outs: list[Any], tensors: list[Any], dim: int = 0) -> list[Fields]:
    rank = len(outs[0])
    dim %= rank
    tensors = [t for t in tensors if t.shape != (0,) and t.shape[dim]]  # nothing comes from what is empty
    if not tensors:
        return [()]
    every = _alike(labels, [t.fields for t in tensors], dim)
    rest = [Value(_but(t.shape, dim), tuple(f for f in fields if f.shape[dim] == 1)) for t, fields in zip(tensors, every, strict=True)]
    along = [[f for f in fields if f.shape[dim] > 1] for fields in every]
    (fields,), _ = meet(labels, pointwise(rest, [rank]), [rest[0].shape], reason)
    return [(*fields, *_side_by_side(labels, tensors, along, dim, reason))] if any(along) else [fields]


def _side_by_side(labels: Labels, tensors: list[Any], along: list[Any], dim: int, reason: int) -> Fields:
    """The field of an axis along which tensors follow each other: that of each (others of it are locked), or entries of its own."""
    parts = []
    for tensor, positions in zip(tensors, along, strict=True):
        for extra in positions[1:]:
            labels.lock(extra, reason)
        parts.append(positions[0] if positions else _filler(labels, tensor, dim, reason))
    top = [max(lengths) for lengths in zip(*(part.shape for part in parts), strict=True)]
    wide = [np.broadcast_to(part, [*top[:dim], part.shape[dim], *top[dim + 1 :]]) for part in parts]
    return (np.concatenate(wide, axis=dim),)


def _alike(labels: Labels, parts: list[Fields], dim: int) -> list[Fields]:
    """The fields of parts that are put side by side: where one varies along another axis as well (entries of each head), so do all that can.

    A part that all heads share has a field of its entries and one of its copies: side by side with those of each head, it has entries for each head, too.
    """
    over = {axis for fields in parts for field in fields if field.shape[dim] > 1 for axis in varying(field)}
    alike = []
    for fields in parts:
        positions = [field for field in fields if field.shape[dim] > 1]
        others = [field for field in fields if field.shape[dim] == 1 and len(varying(field)) == 1 and varying(field)[0] in over]
        if len(positions) == 1 and others and not over - {dim, *(axis for field in (*positions, *others) for axis in varying(field))}:
            used = [*positions, *others]
            fields = (*(field for field in fields if not any(field is each for each in used)), labels.outer(tuple(used)))
        alike.append(fields)
    return alike


@assemble("masked_scatter")
def masked_scatter(labels: Labels, reason: int, outs: list[Any], x: Value, mask: Value, source: Value) -> list[Fields]:
    """Entries of a source, one after the other, where the mask is set: whole rows of them where the mask is the same all along the last axes."""
    rank, rows = len(x.shape), 0
    for back in range(1, min(rank, len(source.shape)) + 1):
        if x.shape[-back] != source.shape[-back] or not _uniform(labels, mask, back):
            break
        rows = back
    names = [LETTERS[axis] if axis >= rank - rows else "_" for axis in range(rank)]
    behind = ["_"] * (len(source.shape) - rows) + names[rank - rows :]
    places = names[rank - len(mask.shape) :]
    rule = expr(f"{' '.join(names)}, {' '.join(places)}, {' '.join(behind)} -> {' '.join(names)}", x, mask, source)
    return meet(labels, rule, [outs[0]], reason)[0]


def _uniform(labels: Labels, value: Value, back: int) -> bool:
    """Whether a tensor is the same all along an axis, counted from the last: broadcast there, or copies of one entry."""
    if back > len(value.shape) or value.shape[-back] == 1:
        return True
    along = [field for field in value.fields if field.shape[-back] > 1]
    return bool(along) and all(labels.is_repeated(field) for field in along)


def _but(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return tuple(1 if axis == dim else size for axis, size in enumerate(shape))


def _filler(labels: Labels, tensor: Value, dim: int, reason: int) -> Array:
    view = [1] * len(tensor.shape)
    view[dim] = tensor.shape[dim]
    filler = labels.fresh(tensor.shape[dim]).reshape(view)
    labels.lock(filler, reason)
    return filler


@assemble("constant_pad_nd")
def pad(labels: Labels, reason: int, outs: list[Any], x: Value, padding: list[Any], value: float = 0) -> list[Fields]:
    fields: list[Array | None] = list(x.fields)
    for index in range(len(padding) // 2):
        axis = len(x.shape) - 1 - index
        before, after = padding[2 * index], padding[2 * index + 1]
        for number, field in enumerate(fields):
            if field is None or field.shape[axis] == 1 or not (before or after):
                continue
            if len(varying(field)) > 1 or before < 0 or after < 0:
                labels.lock(field, reason)
                fields[number] = None
                continue
            ends = [labels.fresh(max(n, 0)).reshape([-1 if a == axis else 1 for a in range(field.ndim)]) for n in (before, after)]
            fields[number] = np.concatenate([ends[0], field, ends[1]], axis=axis)
    return [tuple(field for field in fields if field is not None)]


@assemble("as_strided_")
def as_strided(labels: Labels, reason: int, outs: list[Any], x: Value, *args, **kwargs) -> list[Fields]:
    """The same tensor again, where it has one axis or is none in another layout."""
    if outs[0] != x.shape or sum(n > 1 for n in outs[0]) > 1:
        raise BadRule("the same memory in another layout")
    return [x.fields]


describe("expand", "select", planned=True)
