"""What a rule multiplies and adds up, read from its text: :func:`product`.

Operands that share an axis which no result has are multiplied along it: ``"n i, i o -> n o"`` is a product over ``i``. How often is
the product of the lengths of all axes that have a name; what stays without one (``_``) does not count.

>>> weight = Value((3, 5))
>>> found = product(Expr("n i, i o, o -> n o", (Value((2, 3)), weight, None)), Value((2, 5)))
>>> found.weight.value is weight, found.weight.summed, found.weight.made, found.macs
(True, (0,), (1,), 30)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from .notation import Axes, Expr, Value, factors, parse


class Contraction(NamedTuple):
    """Of a text: the operands that are multiplied, the axes summed over, and the operand that is only added (-1: none)."""

    operands: tuple[int, ...]
    summed: frozenset[str]
    bias: int


def named(axes: Axes) -> set[str]:
    return {name for group in axes for name in group if name not in "_1"}


@lru_cache(maxsize=4096)
def contraction(text: str) -> Contraction | None:
    """What a text multiplies, or None where it is no product."""
    lefts, rights = parse(text)
    if "[" in text:  # a statistic
        return None
    kept = {name for axes in rights for name in named(axes)}
    names = [named(axes) for axes in lefts]
    inner = [name for name in dict.fromkeys(name for each in names for name in sorted(each)) if name not in kept]
    summed = frozenset(name for name in inner if sum(name in each for each in names) > 1)
    operands = tuple(i for i, each in enumerate(names) if each & summed)
    if not summed:
        return None
    added = [i for i, each in enumerate(names) if i not in operands and each and each <= kept]
    return Contraction(operands, summed, added[0] if added else -1)


@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor of a product: which of its axes are summed over, and which are its own in the result (``made``)."""

    value: Value
    axes: Axes
    summed: tuple[int, ...]
    made: tuple[int, ...]
    taps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a call. ``shared``: the axes of every operand that the others and the result have too, such as a batch or heads."""

    rule: Expr
    result: Value | None
    weight: Operand
    input: Operand
    others: tuple[Operand, ...]
    bias: Value | None
    shared: frozenset[str]

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.input, self.weight, *self.others

    def along(self, operand: Operand, names: frozenset[str]) -> tuple[int, ...]:
        return tuple(dim for dim, group in enumerate(operand.axes) if names.intersection(group))

    @property
    def spreads(self) -> bool:
        """Whether every position of the input is multiplied with all taps of the kernel, as in a transposed convolution."""
        return bool(self.input.taps)

    @property
    def out(self) -> int:
        """The axis of the result along which the weight's own axis stands; -1 where it has none or several."""
        if len(self.weight.made) != 1:
            return -1
        names = set(self.weight.axes[self.weight.made[0]])
        dims = [dim for dim, group in enumerate(parse(self.rule.text)[1][0]) if names.intersection(group)]
        return dims[0] if len(dims) == 1 else -1

    @property
    def groups(self) -> int:
        """Into how many parts the inputs of the weight fall that do not meet (groups of a convolution)."""
        return math.prod(self.rule.sizes.get(name, 1) for name in {name for group in self.weight.axes for name in group})

    def volume(self) -> tuple[int, list[tuple[Value, int]]]:
        """A number, and axes of tensors, whose lengths multiplied with it are the multiply-accumulates."""
        sides = [(operand.value, operand.axes) for operand in (self.weight, self.input, *self.others)]
        if self.result is not None:
            sides.append((self.result, parse(self.rule.text)[1][0]))
        constant, dims = _volume(tuple([(axes, tuple(value.shape)) for value, axes in sides]), tuple(self.rule.sizes.items()))
        return constant, [(sides[side][0], dim) for side, dim in dims]

    @property
    def macs(self) -> int:
        constant, axes = self.volume()
        return constant * math.prod(value.shape[dim] for value, dim in axes)


@lru_cache(maxsize=4096)  # layers of a network repeat each other
def _volume(sides: tuple[tuple[Axes, tuple[int, ...]], ...], sizes: tuple[tuple[str, int], ...]) -> tuple[int, tuple[tuple[int, int], ...]]:
    """:meth:`Product.volume` of tensors by their numbers."""
    lengths: dict[str, int] = {}
    for axes, shape in sides:
        for name, size in factors(axes, shape, dict(sizes))[1].items():
            lengths[name] = max(size, lengths.get(name, 1))
    open_names = {name for axes, _ in sides for name in named(axes)}
    found: list[tuple[int, int]] = []
    for side, (axes, shape) in enumerate(sides):
        for dim, group in enumerate(axes):
            if shape[dim] > 1 and "_" not in group and open_names.issuperset(group):
                found.append((side, dim))
                open_names.difference_update(group)
    return math.prod(lengths[name] for name in open_names), tuple(found)


def product(rule: Expr, result: Value | None, weight: int = -1) -> Product | None:
    """The product that a rule describes, if it does. ``weight``: the number of the operand that is the weight.

    Without it the one that is a parameter, or a view of one, is the weight, else the second that is multiplied.
    """
    form = contraction(rule.text)
    if form is None:
        return None
    present = [i for i in form.operands if isinstance(rule.operands[i], Value)]
    if len(present) < 2:
        return None
    if weight not in present:
        still = [i for i in present if rule.operands[i].zero]
        weight = still[0] if len(still) == 1 else present[1]
    shared, operands = _roles(rule.text, weight, tuple(present))
    made = [Operand(rule.operands[number], *axes) for number, *axes in operands]
    bias = rule.operands[form.bias] if form.bias >= 0 else None
    return Product(rule, result, made[0], made[1], tuple(made[2:]), bias if isinstance(bias, Value) else None, shared)


@lru_cache(maxsize=4096)
def _roles(text: str, weight: int, present: tuple[int, ...]) -> tuple[frozenset[str], tuple[tuple[Any, ...], ...]]:
    """The axes that all operands and the result have, and what :class:`Operand` says of each, by its number; the weight first."""
    lefts, rights = parse(text)
    form = contraction(text)
    assert form is not None
    kept = {name for axes in rights for name in named(axes)}
    shared = frozenset(kept.intersection(*(named(lefts[number]) for number in present)))
    numbers, operands = [weight, *(number for number in present if number != weight)], []
    for number in numbers:
        axes = lefts[number]
        elsewhere = {name for other in numbers if other != number for name in named(lefts[other])}
        own = named(axes) - elsewhere
        summed = tuple(dim for dim, group in enumerate(axes) if form.summed.intersection(group))
        made = tuple(dim for dim, group in enumerate(axes) if own.intersection(group) & kept)
        taps = tuple(dim for dim, group in enumerate(axes) if any(name in own and name not in kept for name in group))
        operands.append((number, axes, summed, made, taps))
    return shared, tuple(operands)
