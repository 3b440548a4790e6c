"""Statistics over what may be cut: where they change with the number of entries, the axis stays whole unless the user frees it.

Removed entries are zero, and a sum of them is the same with or without. A mean divides by their number, a product of them is zero, a softmax gives them a
share, and ``cos(x)`` of a removed entry is one. Norms alone take their statistics of what stays: what is divided by a statistic of its own axis is a norm
(:func:`hold_statistics`). Everything else is left whole, with the reason; ``couple(graph, free=("statistic",))`` lets it go.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..operations.labels import Array, Labels, Reason
from ..operations.notation import Expr, Value, meet, parse
from .choices import MINUS_INFINITY
from .features import axis_names
from .node import Node
from .trees import replace

STEPS = 12  # calls from a statistic to where it is used


def hold_statistics(
    labels: Labels, nodes: list[Node], chosen: Callable[[Value, Array], bool] = lambda value, array: False, outputs: Iterable[Value] = ()
) -> None:
    """Ask of the labels, on condition, that axes stay whole over which a statistic is taken that is neither a sum of zeros nor a norm's.

    What is returned (``outputs``) is no norm, whatever else is divided by it. ``chosen`` says of a value and labels of it whether the code chooses among
    them: of such what is gone counts as minus infinity, so that a softmax is over those that stay.
    """
    taken = [node for node in nodes if (node.op.statistic or node.op.softmax) and node.rule is not None and _over(node)]
    if not taken:
        return
    zeros, uses, narrow = Zeros(nodes), _uses(nodes), _narrow(nodes)
    for value in outputs:
        uses[id(value)].append(None)
    for node in taken:
        norm = node.op.statistic in ("norm", "mean") and any(uses[id(value)] for value in node.outs) and not _of_nothing(node, zeros)
        norm = norm and all(_divides(value, False, uses, narrow, STEPS) for value in node.outs)
        if norm or _among_chosen(node, chosen, zeros) or (not node.op.softmax and _sums_zeros(node, zeros)):
            continue
        assert node.rule is not None
        what = "a softmax" if node.op.softmax else "a statistic"
        reason = labels.reason(Reason(f"{what} over it changes with the number of its entries", node.op.short, node.module, node.where, "statistic"))
        rule = Expr(re.sub(r"\[(\w+)\]", "_", node.rule.text), node.rule.operands, node.rule.sizes)
        meet(_OnCondition(labels), rule, [value.shape for value in node.outs], reason)


def _of_nothing(node: Node, zeros: Zeros) -> bool:
    """Whether a statistic is taken of numbers that are made of nothing, or of these alone: none of those that are removed was zero."""
    value = node.held[0]
    while (maker := zeros.makers.get(id(value))) is not None:
        if maker.op.factory or maker.op.shape_only or (maker.op.fills and maker.op.writes):
            return True
        read = [each for each in maker.held if _labelled(each)]
        if len(read) != 1 or not (maker.op.pointwise or maker.op.moves) or maker.op.fills:
            return False
        value = read[0]
    return False


def _among_chosen(node: Node, chosen: Callable[[Value, Array], bool], zeros: Zeros) -> bool:
    """Whether a softmax, or the largest whose position somebody reads, is taken over what is chosen from."""
    position = node.outs[-1].numbers if node.op.chooses_from is not None else None
    if not node.op.softmax and (position is None or not position.matters):
        return False
    if node.rule is None or not all(chosen(node.rule.operands[0], each) for each in _along(node)):
        return False
    return not node.op.softmax or zeros.minus_infinity(node.rule.operands[0])


def _sums_zeros(node: Node, zeros: Zeros) -> bool:
    """Whether a call adds up entries that are zero where they are removed, so that the sum is the same without them; a distance is taken of two.

    Or whether they are what else makes no difference to it: true where all of them have to be.
    """
    if node.op.neutral is not None and len(node.outs) == 1 and node.held:
        return zeros.constant(node.held[0]) == node.op.neutral
    return node.op.statistic in ("sum", "norm") and all(zeros.known(value) for value in node.rule.operands if isinstance(value, Value))  # type: ignore[union-attr]


class _OnCondition:
    """Stands in for the labels: what is joined and locked is noted as a condition."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels

    def fresh(self, size: int) -> Array:
        return self.labels.fresh(size)

    def joint(self, array: Array) -> None:
        self.labels.joint(array)

    def marginal(self, array: Array, axes: tuple[int, ...], carried: bool = False) -> Array:
        return self.labels.marginal(array, axes, carried)

    def join(self, left: Array, right: Array) -> None:
        self.labels.conditions.append(("statistic", left, right, -1))

    def lock(self, labels: Array, reason: int) -> None:
        self.labels.conditions.append(("statistic", labels, labels, reason))


def _over(node: Node) -> bool:
    """Whether a call takes its statistic over an axis that may be cut."""
    return bool(_along(node))


def _along(node: Node) -> list[Array]:
    """The fields along the axes over which a call takes its statistic."""
    assert node.rule is not None
    axes = parse(node.rule.text)[0][0]
    mixed = [dim for dim, names in enumerate(axes) if any(name[0] == "[" for name in names)]
    return [field for field in node.rule.operands[0].fields if any(field.shape[dim] > 1 for dim in mixed)]


def _uses(nodes: Iterable[Node]) -> dict[int, list[Node | None]]:
    """The calls that use each value, by its id; None where it is returned."""
    uses: dict[int, list[Node | None]] = defaultdict(list)
    for node in nodes:
        for value in {id(value): value for value in node.held}.values():
            uses[id(value)].append(node)
    return uses


def _narrow(nodes: Iterable[Node]) -> set[int]:
    """The values (by id) that are a statistic over an axis that may be cut, or are computed from such ones entry by entry."""
    narrow: set[int] = set()
    for node in nodes:
        if node.op.statistic and node.rule is not None:
            made = _over(node)
        else:
            labelled = [value for value in node.held if value.fields or id(value) in narrow]
            made = (node.op.pointwise or node.op.moves) and bool(labelled) and all(id(value) in narrow for value in labelled)
        if made:
            narrow.update(map(id, node.outs))
    return narrow


def _divides(value: Value, inverse: bool, uses: dict[int, list[Node | None]], narrow: set[int], steps: int) -> bool:
    """Whether all that a statistic is used for is to centre and to divide what has the axis."""
    return steps > 0 and all(_as_norm(node, value, inverse, uses, narrow, steps) for node in uses[id(value)])


def _as_norm(node: Node | None, value: Value, inverse: bool, uses: dict[int, list[Node | None]], narrow: set[int], steps: int) -> bool:
    if node is None:
        return False
    wide = [other for other in node.held if other is not value and other.fields and id(other) not in narrow]
    below = node.op.arithmetic == "div" and len(node.held) > 1 and node.held[1] is value
    if not wide:
        if not (node.op.pointwise or node.op.moves):
            return False
        negative = node.op.zero == "first" and not node.op.arithmetic and any(number < 0 for number in _numbers(node))  # a power
        inverse ^= node.op.inverts or below or negative
        return all(_divides(out, inverse, uses, narrow, steps - 1) for out in node.outs)
    if node.op.arithmetic == "sub":
        return _scaled(node.outs[0], uses, narrow, STEPS // 2)
    return below or (node.op.arithmetic == "mul" and inverse)


def _scaled(value: Value, uses: dict[int, list[Node | None]], narrow: set[int], steps: int) -> bool:
    """Whether what was centred goes into a statistic of its own, or is divided by one."""
    for node in uses[id(value)] if steps else ():
        if node is None:
            continue
        if node.op.statistic or any(id(other) in narrow for other in node.held if other is not value):
            return True
        if (node.op.pointwise or node.op.moves) and any(_scaled(out, uses, narrow, steps - 1) for out in node.outs):
            return True
    return False


# -- what is zero where entries are removed ----------------------------------------------------------------------------------------


class Zeros:
    """The values whose removed entries are exactly zero when those of the parameters are."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.ids: set[int] = set()
        self.makers = {id(value): node for node in nodes for value in node.outs}
        for node in nodes:
            if self.keeps(node):
                self.ids.update(map(id, node.outs))

    def known(self, value: Value) -> bool:
        return value.zero or id(value) in self.ids

    def constant(self, value: Value, steps: int = STEPS) -> float | None:
        """What the removed entries of a value are (True is 1), where it is known: zeros, and what operations make of these entry by entry."""
        if self.known(value):
            return 0.0
        node = self.makers.get(id(value))
        if node is None or not steps or not node.op.pointwise or node.op.moves or node.op.writes or node.op.fills or len(node.outs) != 1:
            return None
        constants = {id(each): self.constant(each, steps - 1) for each in node.held if _labelled(value) <= _labelled(each)}
        if len(constants) != len({id(each) for each in node.held}) or None in constants.values():
            return None
        entry = lambda each: torch.tensor(constants[id(each)], dtype=each.dtype)  # noqa: E731
        return float(node.func(*replace(node.args, entry), **replace(node.kwargs, entry)))

    def minus_infinity(self, value: Any, steps: int = 2 * STEPS) -> bool:
        """Whether a score that is minus infinity is so still: the result of a product, moved, with something added to it, or times a factor."""
        if not isinstance(value, Value) or not steps:
            return False
        node = self.makers.get(id(value))
        if node is None or node.products:
            return True
        if node.constant is not None:
            return node.constant <= MINUS_INFINITY
        first = node.args[0] if node.args else None
        if node.op.arithmetic in ("add", "mul"):
            return any(self.minus_infinity(each, steps - 1) for each in node.held if _labelled(each))
        if node.op.puts:
            number = node.argument("value")
            return isinstance(number, int | float) and number <= MINUS_INFINITY and self.minus_infinity(first, steps - 1)
        return (node.op.arithmetic in ("sub", "div") or node.op.keeps_zero or node.op.writes_at) and self.minus_infinity(first, steps - 1)

    def keeps(self, node: Node) -> bool:
        op, first = node.op, node.held[0] if node.held else None
        if first is None or op.fills or op.softmax or op.statistic == "other":
            return False
        if op.norm:
            norm = node.norm
            return norm is not None and (norm.weight is not None or (op.norm in ("batch", "rms") and self.known(norm.x)))
        if op.zero:
            return self.pointwise(node)
        if node.products:
            return self.product(node)
        if op.pointwise and not op.moves:
            return False
        return all(self.known(value) for value in node.held if value.fields)

    def pointwise(self, node: Node) -> bool:
        axes = {back for out in node.outs for back in _labelled(out)}
        if node.op.zero == "all":
            return len(node.held) > 1 and all(self.known(value) and axes <= _labelled(value) for value in node.held)
        if node.op.zero == "first":
            return self.known(node.held[0]) and axes <= _labelled(node.held[0]) and all(number > 0 for number in _numbers(node))
        return axes <= {back for value in node.held if self.known(value) for back in _labelled(value)}

    def product(self, node: Node) -> bool:
        rule = node.rule
        if rule is None:
            return False
        lefts, rights = parse(rule.text)
        operands = [(value, _named(value, axes)) for value, axes in zip(rule.operands, lefts, strict=True) if isinstance(value, Value)]
        bias = node.bias
        for name in _named(node.outs[0], rights[0]):
            factors = [(value, names) for value, names in operands if value is not bias]
            if not any(self.known(value) and name in names for value, names in factors):
                return False
            if bias is not None and not any(value is bias and self.known(value) and name in names for value, names in operands):
                return False
        return True


def _numbers(node: Node) -> list[float]:
    return [item for item in (*node.args, *node.kwargs.values()) if type(item) in (int, float)]


def _labelled(value: Value) -> set[int]:
    """The axes that may be cut, counted from the last."""
    return {dim - field.ndim for field in value.fields for dim, size in enumerate(field.shape) if size > 1}


def _named(value: Value, axes: Any) -> set[str]:
    return {name for field in value.fields for size, dim in zip(field.shape, axes, strict=True) if size > 1 for name in axis_names(dim)}
