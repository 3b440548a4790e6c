# pyright: strict, reportUnnecessaryIsInstance=false
"""Two cuts as one: :func:`compose` maps the second plan's positions through the first's, back to the original model.

Composition is associative, and the empty plan changes nothing, so any number of rounds is one plan that
:func:`graphprune.load` and :func:`graphprune.expand` understand.

>>> first, second = Plan({"w": {0: [1, 3, 5]}}, {"w": (6,)}), Plan({"w": {0: [0, 2]}}, {"w": (3,)})
>>> compose(first, second).cuts
{'w': {0: [1, 5]}}
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..errors import BadPlan
from .gains import Gain
from .masks import parameter_name
from .outline import Outline
from .parts import GONE, Part, narrowed, pack, unpack, widened
from .plan import Plan, plan_of


def compose(first: Plan, second: Plan) -> Plan:
    """The plan with ``apply(model, compose(first, second))`` equal to ``apply(apply(model, first), second)``.

    Raises :class:`~graphprune.errors.BadPlan` when ``second`` was made for other shapes than ``first`` leaves.
    """
    for plan in (first, second):
        if not isinstance(plan, Plan):
            raise BadPlan(f"a {type(plan).__name__} is no plan; give what shrink(..., return_plan=True) or graphprune.plan(...) returned")
    second = _unmasked(second, {part.name for part in first.parts if part.kind == "mask"})
    cuts = {name: dict(axes) for name, axes in first.cuts.items()}
    shapes = dict(first.shapes)
    for name, axes in second.cuts.items():
        _check(first, second, name)
        shapes.setdefault(name, second.shapes[name])
        kept_here = cuts.setdefault(name, {})
        for axis, kept in axes.items():
            kept_here[axis] = [kept_here[axis][position] for position in kept] if axis in kept_here else list(kept)
    parts = _parts(first, second)
    shapes = {**{part.name: second.shapes[part.name] for part in second.parts if part.name in second.shapes}, **shapes}
    edits = {edit[:-1]: edit[-1] for edit in (*first.edits, *second.edits)}
    edited = tuple((*path, new) for path, new in edits.items())
    rewrites = tuple(dict.fromkeys((*first.rewrites, *second.rewrites)))
    numbers = dict(second.numbers)
    for name, new in first.numbers.items():
        then = second.numbers.get(name)
        numbers[name] = [-1 if n < 0 else then[n] for n in new] if then else new
    texts, summary = (_notes(first, second), _lines(first, second)), _outline(first, second, cuts)
    gains = _gains(first, second)
    tokens = second.tokens.after(first.tokens) if first.tokens and second.tokens else first.tokens or second.tokens
    return Plan(cuts, shapes, edited, *texts, rewrites=rewrites, numbers=numbers, parts=parts, outline=summary, gains=gains, tokens=tokens)


def so_far(model: torch.nn.Module, plan: Plan) -> Plan:
    """``plan`` relative to the model that was there before the first cut: the model's own plan, if it has one, and then this."""
    earlier = plan_of(model)
    return compose(earlier, plan) if earlier is not None else plan


def _unmasked(plan: Plan, masked: set[str]) -> Plan:
    """A plan of a model with masks, in the names that its weights had before: a mask follows the weight it lies on."""
    if not masked:
        return plan
    names = {name: parameter_name(name) for name in plan.shapes}
    lie = {name for name in plan.shapes if any(name == f"{path}parametrizations.{key}.0.mask" for path, key in map(_split, masked))}
    spoken = {name: names[name] if names[name] in masked else name for name in plan.shapes if name not in lie}
    cuts = {spoken[name]: axes for name, axes in plan.cuts.items() if name in spoken}
    return replace(plan, cuts=cuts, shapes={name: plan.shapes[old] for old, name in spoken.items()})


def _split(name: str) -> tuple[str, str]:
    path, dot, key = name.rpartition(".")
    return path + dot, key


def _gains(first: Plan, second: Plan) -> tuple[Gain, ...]:
    """Those of both; the calls of the first are those of the original shapes."""
    return tuple({gain.name: gain for gain in (*second.gains, *first.gains)}.values())


def _parts(first: Plan, second: Plan) -> tuple[Part, ...]:
    """The parts of both, in positions of the original; what lies inside a module that goes later goes with it."""
    parts = {(part.kind, part.name): part for part in first.parts}
    for part in second.parts:
        if part.kind not in GONE:
            _check(first, second, part.name)
        parts[part.kind, part.name] = _earlier(part, parts.get((part.kind, part.name)), first, second)
    gone = tuple(f"{part.name}." for part in second.parts if part.kind in GONE)
    return tuple(part for part in parts.values() if not gone or not part.name.startswith(gone))


def _earlier(part: Part, before: Part | None, first: Plan, second: Plan) -> Part:
    """A part of the second plan, about what was there before the first."""
    if part.kind == "kernel" and before:
        return replace(part, data=tuple(tuple(taps[i] for i in kept) for taps, kept in zip(before.data, part.data, strict=True)))
    if part.kind not in ("mask", "columns"):
        return part
    shape, cuts, skip = second.shapes[part.name], first.cuts.get(part.name, {}), part.kind == "columns"
    whole = first.shapes.get(part.name, shape)[skip:]
    mask = widened(unpack(part.data, shape[skip:]), whole, {axis - skip: kept for axis, kept in cuts.items() if axis >= skip})
    return replace(part, data=pack(mask & unpack(before.data, whole) if before else mask))


def _check(first: Plan, second: Plan, name: str) -> None:
    remaining = _left(first, name, second.shapes[name])
    if remaining != tuple(second.shapes[name]):
        raise BadPlan(f"the second plan cuts {name} of shape {tuple(second.shapes[name])}, the first one leaves {remaining}")


def _left(first: Plan, name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    shape = first.shapes.get(name, otherwise)
    remaining = tuple(len(first.cuts.get(name, {}).get(axis, range(size))) for axis, size in enumerate(shape))
    thin = [narrowed(unpack(part.data, shape[1:]), _inner(first, name)) for part in first.parts if (part.kind, part.name) == ("columns", name)]
    return (remaining[0], int(thin[0].sum())) if thin else remaining


def _inner(plan: Plan, name: str) -> dict[int, list[int]]:
    """The cuts of all axes but the first, counted without it."""
    return {axis - 1: kept for axis, kept in plan.cuts.get(name, {}).items() if axis}


def _notes(first: Plan, second: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first.notes, *second.notes)))


def _lines(first: Plan, second: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first.remarks, *second.remarks)))


def _outline(first: Plan, second: Plan, cuts: dict[Any, Any]) -> Outline | None:
    if first.outline is None or second.outline is None:
        return first.outline or second.outline
    return first.outline.then(second.outline, cuts)
