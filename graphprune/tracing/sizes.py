"""Sizes that remember where they came from, so that the attribute behind a traced constant can be found.

While a model is traced, integer attributes of its modules and the entries of ``tensor.shape`` are :class:`Size`
objects: integers that carry an expression. What reaches ``view``, ``split`` or ``expand`` then tells which attribute has
to change when an axis becomes shorter. What becomes a plain number on the way (``int(c / 2)``, ``f"{c}"``) is a
:class:`Doubt`: whether the code still computes the right thing of a shorter axis has to be tried.

>>> heads = Size(12, ("attr", ("attn", "num_heads")))
>>> (heads * 64).expr
('*', ('attr', ('attn', 'num_heads')), 64)
>>> evaluate((heads * 64).expr, lambda leaf: 6)
384
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Number
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import torch

Expr = Any
CACHE = type(functools.cache(lambda: None))
OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


class Branch(NamedTuple):
    """A comparison of sizes and its outcome; ``at`` as for a doubt (-1: a kernel of torch's branches on it, whatever the code does)."""

    symbol: str
    left: Expr
    right: Expr
    outcome: bool
    at: int = -1
    where: tuple[str, int] | None = None


class Doubt(NamedTuple):
    """A size that became a plain number: its expression, how many calls had been recorded by then, and where it happened."""

    expr: Expr
    at: int
    where: tuple[str, int]


@dataclass(frozen=True)
class Uses:
    """What one run did with its sizes: factors, sizes found equal, branches taken, and those that became plain numbers.

    ``counted`` says how many calls were recorded so far, ``caches`` are those of functions that may have been called with sizes.
    """

    floats: list[Expr] = field(default_factory=list)
    equals: list[tuple[Expr, Expr]] = field(default_factory=list)
    outcomes: list[Branch] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    counted: Callable[[], int] = lambda: 0
    caches: dict[int, Any] = field(default_factory=dict)

    def forgotten(self) -> None:
        """Empty the caches that sizes were keys of: they hold results for this run alone."""
        for cache in self.caches.values():
            cache.cache_clear()
        self.caches.clear()

    def doubt(self, expr: Expr) -> None:
        self.doubts.append(Doubt(expr, self.counted(), _user(sys._getframe(2))))

    def branch(self, symbol: str, left: Expr, right: Expr, outcome: bool) -> None:
        self.outcomes.append(Branch(symbol, left, right, outcome, self.counted(), _user(sys._getframe(2))))


def _user(frame: FrameType) -> tuple[str, int]:
    """File and line of the first frame that is not in this file."""
    while frame.f_code.co_filename == __file__ and frame.f_back:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _caches(frame: FrameType) -> list[Any]:
    """Functions that remember their results (``functools.cache``) among those that the running code names.

    To such a function equal numbers are equal arguments: it would give a size the result of another.
    """
    code = frame.f_code
    if frame.f_lasti < 0 or "CALL" not in dis.opname[code.co_code[frame.f_lasti]]:
        return []  # it is a key of a dictionary
    inside = frame.f_locals
    named = [inside[name] for name in (*code.co_varnames, *code.co_freevars) if name in inside]
    named += [frame.f_globals[name] for name in code.co_names if name in frame.f_globals]
    caches = [each for each in named if type(each) is CACHE]
    for each in named:
        spaces = [vars(each)] if isinstance(each, ModuleType) else [vars(kind) for kind in (each if isinstance(each, type) else type(each)).__mro__]
        caches += [space[name] for space in spaces for name in code.co_names if type(space.get(name)) is CACHE]
    return caches


COMPARISONS: dict[str, Callable[..., Any]] = {"==": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
number = int.__int__  # the plain number of a size, of which no note is taken


def _compared(symbol: str) -> Callable[..., Any]:
    """A comparison that writes down its outcome: the code may have branched on it."""
    compute = COMPARISONS[symbol]

    def method(self: Size, other: object) -> bool:
        if not isinstance(other, int):
            if isinstance(other, torch.Tensor) or not isinstance(other, Number):
                return NotImplemented
            self.uses.doubt(self.expr)
            return compute(number(self), other)
        outcome = compute(number(self), number(other))
        self.uses.branch(symbol, self.expr, expression(other), outcome)
        return outcome

    return method


class Size(int):
    """An integer with the expression that made it; what is done with it is noted in the ``uses`` of the run that it belongs to."""

    expr: Expr
    uses: Uses

    def __new__(cls, value: Any = 0, expr: Expr = None, uses: Uses | None = None) -> Any:
        if expr is None:  # code that makes another number of the kind of this one (``type(size)(x)``)
            return int(value)
        size = super().__new__(cls, value)
        size.expr = expr
        size.uses = Uses() if uses is None else uses
        return size

    def __hash__(self) -> int:
        caches = _caches(sys._getframe(1))
        if caches:
            self.uses.caches.update((id(cache), cache) for cache in caches)
            return id(self)
        return int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        same = _compared("==")(self, other)
        if same is True and isinstance(other, Size):
            self.uses.equals.append((self.expr, other.expr))
        return same

    def __ne__(self, other: object) -> bool:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    def __bool__(self) -> bool:
        self.uses.branch("==", self.expr, 0, number(self) == 0)
        return number(self) != 0

    def __float__(self) -> float:
        self.uses.floats.append(self.expr)
        return float(number(self))

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        if not isinstance(other, int) or number(other) < 0 or mod is not None:
            if isinstance(other, torch.Tensor):
                return NotImplemented
            self.uses.floats.append(self.expr)
            return pow(number(self), other, mod)
        result = self
        for _ in range(number(other) - 1):
            result = result * self
        return result if other else 1

    def __lshift__(self, other: Any) -> Any:
        return self * 2 ** number(other) if isinstance(other, int) else NotImplemented

    def __rshift__(self, other: Any) -> Any:
        return self // 2 ** number(other) if isinstance(other, int) else NotImplemented

    def __divmod__(self, other: Any) -> Any:
        return (self // other, self % other)

    def __rdivmod__(self, other: Any) -> Any:
        return (other // self, other % self)

    def __neg__(self) -> Any:
        return 0 - self

    def __abs__(self) -> Any:
        return -self if self < 0 else self

    def __round__(self, digits: Any = None) -> int:
        if digits is None or digits >= 0:
            return self
        self.uses.doubt(self.expr)
        return round(number(self), digits)

    def __pos__(self) -> Size:
        return self

    __floor__ = __ceil__ = conjugate = __pos__
    numerator = real = property(__pos__)  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[Any, Any]) -> Size:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (number(self),)


def _binary(symbol: str, reverse: bool) -> Callable[..., Any]:
    compute = OPERATORS[symbol]

    def method(self: Size, other: Any) -> Any:
        if not isinstance(other, int):
            if isinstance(other, torch.Tensor):
                return NotImplemented  # a call of the model, which sees the size
            self.uses.doubt(self.expr)
            if not isinstance(other, float):
                return NotImplemented
            return compute(other, number(self)) if reverse else compute(number(self), other)
        pair = (expression(other), self.expr) if reverse else (self.expr, expression(other))
        numbers = (number(other), number(self)) if reverse else (number(self), number(other))
        return Size(compute(*numbers), (symbol, *pair), self.uses)

    return method


def _plain(name: str) -> Callable[..., Any]:
    """An operation of integers whose result no expression says: a plain number, and a doubt."""
    compute = getattr(int, name)

    def method(self: Size, *others: Any) -> Any:
        if others and isinstance(others[0], torch.Tensor):
            return NotImplemented
        self.uses.doubt(self.expr)
        for other in others:
            if isinstance(other, Size):
                other.uses.doubt(other.expr)
        return compute(number(self), *(number(other) if isinstance(other, Size) else other for other in others))

    return method


def _divided(name: str) -> Callable[..., Any]:
    plain = _plain(name)

    def method(self: Size, other: Any) -> Any:
        if isinstance(other, float):
            self.uses.doubt(self.expr)
            return getattr(float(number(self)), name)(other)
        return plain(self, other)

    return method


for _symbol, _name in (("<", "lt"), ("<=", "le"), (">", "gt"), (">=", "ge")):
    setattr(Size, f"__{_name}__", _compared(_symbol))
for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(Size, f"__{_name}__", _binary(_symbol, reverse=False))
    setattr(Size, f"__r{_name}__", _binary(_symbol, reverse=True))
for _name in "int index trunc str repr format invert and or xor rand ror rxor rpow rlshift rrshift".split():
    if hasattr(int, f"__{_name}__"):
        setattr(Size, f"__{_name}__", _plain(f"__{_name}__"))
for _name in ("truediv", "rtruediv"):
    setattr(Size, f"__{_name}__", _divided(f"__{_name}__"))
for _name in ("bit_length", "bit_count", "to_bytes", "as_integer_ratio"):
    setattr(Size, _name, _plain(_name))


def expression(value: int) -> Expr:
    """The expression of an integer: its own if it is a Size, else the number."""
    return value.expr if isinstance(value, Size) else number(value)


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
