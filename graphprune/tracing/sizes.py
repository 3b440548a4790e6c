"""Sizes that remember where they came from, so that the attribute behind a traced constant can be found.

While a model is traced, integer attributes of its modules and the entries of ``tensor.shape`` are :class:`Size`
objects: integers that carry an expression. What reaches ``view``, ``split`` or ``expand`` then tells which attribute has
to change when an axis becomes shorter.

>>> heads = Size(12, ("attr", ("attn", "num_heads")))
>>> (heads * 64).expr
('*', ('attr', ('attn', 'num_heads')), 64)
>>> evaluate((heads * 64).expr, lambda leaf: 6)
384
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Expr = Any
OPERATORS: dict[str, Callable] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


@dataclass(frozen=True)
class Uses:
    """What one run did with its sizes that must stay true: factors, sizes found equal, and branches taken (symbol, left, right, outcome)."""

    floats: list[Expr] = field(default_factory=list)
    equals: list[tuple[Expr, Expr]] = field(default_factory=list)
    outcomes: list[tuple[str, Expr, Expr, bool]] = field(default_factory=list)


COMPARISONS: dict[str, Callable] = {"==": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def _compared(symbol: str) -> Callable:
    """A comparison that writes down its outcome: the code may have branched on it."""
    compute = COMPARISONS[symbol]

    def method(self: Size, other: object) -> bool:
        if not isinstance(other, int):
            return compute(int(self), other) if isinstance(other, float) else NotImplemented
        outcome = compute(int(self), int(other))
        self.uses.outcomes.append((symbol, self.expr, expression(other), outcome))
        return outcome

    return method


class Size(int):
    """An integer with the expression that made it; what is done with it is noted in the ``uses`` of the run that it belongs to."""

    expr: Expr
    uses: Uses

    def __new__(cls, value: int, expr: Expr, uses: Uses | None = None) -> Size:
        size = super().__new__(cls, value)
        size.expr = expr
        size.uses = Uses() if uses is None else uses
        return size

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        same = _compared("==")(self, other)
        if same is True and isinstance(other, Size):
            self.uses.equals.append((self.expr, other.expr))
        return same

    def __ne__(self, other: object) -> bool:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    def __float__(self) -> float:
        self.uses.floats.append(self.expr)
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        self.uses.floats.append(self.expr)
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.uses.floats.append(self.expr)
        return other / int(self)

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        if not isinstance(other, int) or other < 0:
            self.uses.floats.append(self.expr)
            return int(self) ** other
        result = self
        for _ in range(int(other) - 1):
            result = result * self
        return result if other else 1

    def __deepcopy__(self, memo: dict) -> Size:
        return self

    def __reduce__(self) -> tuple:
        return int, (int(self),)


def _binary(symbol: str, reverse: bool) -> Callable:
    compute = OPERATORS[symbol]

    def method(self: Size, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            if isinstance(other, float) and symbol in "*/":
                self.uses.floats.append(self.expr)
            plain = int(self)
            return compute(other, plain) if reverse else compute(plain, other)
        pair = (expression(other), self.expr) if reverse else (self.expr, expression(other))
        numbers = (int(other), int(self)) if reverse else (int(self), int(other))
        return Size(compute(*numbers), (symbol, *pair), self.uses)

    return method


for _symbol, _name in (("<", "lt"), ("<=", "le"), (">", "gt"), (">=", "ge")):
    setattr(Size, f"__{_name}__", _compared(_symbol))
for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(Size, f"__{_name}__", _binary(_symbol, reverse=False))
    setattr(Size, f"__r{_name}__", _binary(_symbol, reverse=True))


def expression(value: int) -> Expr:
    """The expression of an integer: its own if it is a Size, else the number."""
    return value.expr if isinstance(value, Size) else int(value)


def evaluate(expr: Expr, leaf: Callable[[Expr], int]) -> int:
    """The value of an expression, with ``leaf`` giving that of ``("attr", …)`` and ``("dim", …)``."""
    if isinstance(expr, int):
        return expr
    if expr[0] in OPERATORS:
        left, right = evaluate(expr[1], leaf), evaluate(expr[2], leaf)
        return OPERATORS[expr[0]](left, right) if right or expr[0] not in "//%" else 0
    return leaf(expr)


def leaves(expr: Expr) -> Iterator[Expr]:
    """All ``("attr", …)`` and ``("dim", …)`` in an expression."""
    if isinstance(expr, int):
        return
    if expr[0] in OPERATORS:
        yield from leaves(expr[1])
        yield from leaves(expr[2])
        return
    yield expr
