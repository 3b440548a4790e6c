"""Two cuts as one: :func:`compose` maps the second plan's positions through the first's, back to the original model.

Composition is associative, and the empty plan changes nothing, so any number of rounds is one plan that
:func:`graphprune.load` and :func:`graphprune.expand` understand.

>>> first, second = Plan({"w": {0: [1, 3, 5]}}, {"w": (6,)}), Plan({"w": {0: [0, 2]}}, {"w": (3,)})
>>> compose(first, second).cuts
{'w': {0: [1, 5]}}
"""

from __future__ import annotations

import torch

from .errors import BadPlan
from .plan import Plan


def compose(first: Plan, second: Plan) -> Plan:
    """The plan with ``apply(model, compose(first, second))`` equal to ``apply(apply(model, first), second)``.

    Raises :class:`~graphprune.errors.BadPlan` when ``second`` was made for other shapes than ``first`` leaves.
    """
    cuts = {name: dict(axes) for name, axes in first.cuts.items()}
    shapes = dict(first.shapes)
    for name, axes in second.cuts.items():
        left = _left(first, name, second.shapes[name])
        if left != tuple(second.shapes[name]):
            raise BadPlan(f"the second plan cuts {name} of shape {tuple(second.shapes[name])}, the first one leaves {left}")
        shapes.setdefault(name, second.shapes[name])
        mine = cuts.setdefault(name, {})
        for axis, kept in axes.items():
            mine[axis] = [mine[axis][position] for position in kept] if axis in mine else list(kept)
    edits = {edit[:-1]: edit[-1] for edit in (*first.edits, *second.edits)}
    edited = tuple((*path, new) for path, new in edits.items())
    rewrites = tuple(dict.fromkeys((*first.rewrites, *second.rewrites)))
    numbers = dict(second.numbers)
    for name, new in first.numbers.items():
        then = second.numbers.get(name)
        numbers[name] = [-1 if n < 0 else then[n] for n in new] if then else new
    return Plan(cuts, shapes, edited, _notes(first, second), _lines(cuts, shapes, second), rewrites=rewrites, numbers=numbers)


def so_far(model: torch.nn.Module, plan: Plan) -> Plan:
    """``plan`` relative to the model that was there before the first cut: the model's own plan, if it has one, and then this."""
    earlier = model.__dict__.get("graphprune_plan")
    return compose(earlier, plan) if earlier is not None else plan


def _left(first: Plan, name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    shape = first.shapes.get(name, otherwise)
    return tuple(len(first.cuts.get(name, {}).get(axis, range(size))) for axis, size in enumerate(shape))


def _notes(first: Plan, second: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first.notes, *second.notes)))


def _lines(cuts: dict, shapes: dict, second: Plan) -> tuple[str, ...]:
    lines = [f"{name} axis {axis}: {shapes[name][axis]} -> {len(kept)}" for name, axes in cuts.items() for axis, kept in sorted(axes.items())]
    return (*lines, *(line for line in second.lines if line.startswith("whole: ")))
