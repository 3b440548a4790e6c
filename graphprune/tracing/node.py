"""One recorded call, and all that can be asked of it: :class:`Node`. What it answers is said where the operation is described.

>>> from .trace import trace
>>> node = trace(torch.nn.Linear(3, 5), torch.zeros(2, 3)).nodes[-1]
>>> node.name, node.rule.text, node.macs, node.bias.leaf
('aten::addmm', 'o, n i, i o -> n o', 30, 'bias')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import basename
from typing import Any, NamedTuple

import torch

from ..operations import Operation
from ..operations.contraction import Product
from ..operations.notation import Expr, Value
from ..operations.record import pointwise
from ..wording import brief

__all__ = ["SHAPED", "Node", "Norm", "line", "torch"]

# Numbers that say the shape of a result, by their names in the schemas of operations: the shape itself is compared.
SHAPED = frozenset("size sizes self_size input_size input_sizes split_size split_sizes normalized_shape N C HxW output_size".split())


def line(where: tuple[str, int] | None) -> str:
    return f"{basename(where[0])}:{where[1]}" if where else ""


class Norm(NamedTuple):
    """A norm's kind, what it works on, its scale and shift, and the statistics it was given (None: it takes those of its input)."""

    kind: str
    x: Value
    weight: Value | None
    bias: Value | None
    mean: Value | None
    var: Value | None
    eps: float
    training: bool


@dataclass(eq=False, slots=True)
class Node:
    """One ATen call: what it is, its arguments (tensors as Value), its results, and where it was made."""

    op: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Value]
    module: str
    where: tuple[str, int] | None
    held: list[Value]  # all values among the arguments
    reduces: bool = False
    step: int = -1
    _rule: Any = field(default=None, repr=False)
    _products: tuple[Product, ...] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        arguments = ", ".join([brief(value) for value in self.args] + [f"{name}={brief(value)}" for name, value in self.kwargs.items()])
        results = ", ".join("x".join(map(str, out.shape)) or "scalar" for out in self.outs)
        place = ", ".join(part for part in (self.module, self.line) if part)
        return f"{self.name}({arguments}) -> {results}{f'  # {place}' if place else ''}"

    @property
    def line(self) -> str:
        return line(self.where)

    @property
    def func(self) -> Any:
        """The overload that torch called."""
        return self.op.func

    @property
    def name(self) -> str:
        """With its namespace: "aten::addmm"."""
        return self.op.name

    @property
    def rule(self) -> Expr | None:
        """What the call does to axes, or None where it only moves or assembles entries, or is not described."""
        if self._rule is None:
            self._rule = self._described() or False
        return self._rule or None

    def _described(self) -> Expr | None:
        if self.op.rule is not None:
            return self.op.describes(self.args, self.kwargs)
        if self.op.move is not None or not self.op.pointwise:
            return None
        ranked = [value for value in self.held if value.shape]
        return pointwise(ranked, [len(value.shape) for value in self.outs]) if ranked else None

    @property
    def products(self) -> tuple[Product, ...]:
        """What the call multiplies and adds up: one product for most, none for what is no product, two for attention."""
        if self._products is None:
            rule = self.rule if self.op.rule is not None else None
            self._products = self.op.multiplies(rule, self.args, self.kwargs, self.outs[0] if self.outs else None) if rule else ()
        return self._products

    @property
    def product(self) -> Product | None:
        """The one product that the call is."""
        return self.products[0] if len(self.products) == 1 else None

    @property
    def weight(self) -> Value | None:
        return self.product.weight.value if self.product else None

    @property
    def bias(self) -> Value | None:
        return self.product.bias if self.product else None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the call as it was recorded."""
        return sum(product.macs for product in self.products)

    @property
    def norm(self) -> Norm | None:
        if not self.op.norm:
            return None
        names = self.op.arguments
        eps = self.argument("eps" if "eps" in names else "epsilon")
        weight, bias, mean, var = (self._value(name) for name in ("weight", "bias", "running_mean", "running_var"))
        return Norm(self.op.norm, self.args[0], weight, bias, mean, var, float(eps or 0.0), bool(self.argument("training")))

    def _value(self, name: str) -> Value | None:
        argument = self.argument(name)
        return argument if isinstance(argument, Value) else None

    @property
    def is_move(self) -> bool:
        """Whether entries are only put into other places, or repeated."""
        return self.op.moves

    @property
    def is_pointwise(self) -> bool:
        return self.op.pointwise

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by the name that the operation's own signature gives it."""
        return self.op.argument(name, self.args, self.kwargs, default)

    @property
    def constant(self) -> float | None:
        """What every entry of the result is, if it is one number that the call says."""
        number = self.argument(self.op.filled) if isinstance(self.op.filled, str) else self.op.filled
        return float(number) if isinstance(number, int | float) else None

    def refitted(self, args: Sequence[Any], sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """The arguments with the numbers that have to follow: factors of the rule (``sizes``), and shapes that are repeated."""
        args = list(args)
        for at, name in self.op.size_arguments(self.args, self.kwargs).items():
            args[at] = sizes.get(name, args[at])
        for at, value in (self.op.follows(*args) if self.op.follows else {}).items():
            args[at] = value
        return tuple(args)
