"""Weights that a norm makes keep what they are: a gain or a vector beside the norm takes up what the removed entries leave behind.

``g * v / |v|`` (weight norm) grows for those that stay when inputs of ``v`` go, ``w / (u' w v)`` (spectral norm) likewise. Multiplying ``g`` by the norm of
what stays over the norm of all, or dividing ``u`` by it, puts the made weight back to what it was. Which tensor takes it up, and whether one can, is
found by trying: the calls that make the weight are run on random tensors, whole and with the removed entries set to zero (:func:`gains_of`). A plan
holds these calls, so that the numbers are computed from whichever weights it is applied to (:func:`factors_of`).

>>> calls = (("_weight_norm_interface.default", (("leaf", "v"), ("leaf", "g"), 0)),)
>>> gain = Gain("g", 1.0, calls, 0, ((1, ("v", 1)),))
>>> v, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]])
>>> round(float(factor(gain, {"v": v, "g": g}, {"v": {1: [0]}})), 6)
0.6
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..operations import operation
from ..operations.labels import Array
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.node import Node

Cuts = Mapping[str, Mapping[int, Sequence[int]]]
MOST = 64  # calls that make one weight


@dataclass(frozen=True)
class Gain:
    """The tensor ``name`` takes up what cutting does to the weight that ``calls`` make: times what the weight lacks, to a ``power`` (-1 for a divisor).

    ``calls`` are (operation, arguments), where ("leaf", name) and ("call", number) stand for tensors; ``result`` says which of the last call's results
    the weight is. ``axes``: the (tensor, axis) whose cut an axis of the weight follows.
    """

    name: str
    power: float
    calls: tuple[tuple[str, tuple[Any, ...]], ...]
    result: int
    axes: tuple[tuple[int, tuple[str, int]], ...]

    def leaves(self) -> list[str]:
        """The tensors that the weight is made of."""
        return list(dict.fromkeys(_leaves([arguments for _, arguments in self.calls])))


def _leaves(items: Any) -> Iterator[str]:
    if isinstance(items, tuple) and len(items) == 2 and items[0] == "leaf":
        yield items[1]
    elif isinstance(items, list | tuple):
        for item in items:
            yield from _leaves(item)


def factors_of(gains: Sequence[Gain], tensors: Mapping[str, torch.Tensor], cuts: Cuts) -> dict[str, torch.Tensor]:
    """What every tensor that takes something up is multiplied by, already cut like it: float64, by name."""
    factors, scales = {}, {}
    for gain in gains:
        if all(name in tensors and not tensors[name].is_meta for name in gain.leaves()):
            scale = scales[gain.name] = factor(gain, tensors, cuts, scales)
            axes = {axis: kept for axis, kept in cuts.get(gain.name, {}).items() if scale.ndim and scale.shape[axis] > 1}
            for axis, kept in axes.items():
                scale = scale.index_select(axis, torch.tensor(kept, device=scale.device))
            factors[gain.name] = scale
    return factors


def factor(gain: Gain, tensors: Mapping[str, torch.Tensor], cuts: Cuts, scales: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """What ``gain.name`` is multiplied by, of its original shape or a single number; 1 where nothing is known (a weight of zeros).

    ``scales``: what other tensors are multiplied by already, for norms that stand in each other.
    """
    whole = {name: tensors[name].detach().double() for name in gain.leaves()}
    scale = _wanted(gain, whole, _scaled(whole, scales or {}), cuts)
    return torch.ones((), dtype=torch.float64) if scale is None else scale**gain.power


def _scaled(whole: dict[str, torch.Tensor], scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * scales[name] if name in scales else tensor for name, tensor in whole.items()}


def _wanted(gain: Gain, whole: dict[str, torch.Tensor], scaled: dict[str, torch.Tensor], cuts: Cuts) -> torch.Tensor | None:
    """The made weight over what it would be after the cut, in the shape of the target or as one number; None if it has neither."""
    before, after, target = _run(gain, whole), _run(gain, _zeroed(scaled, cuts), True), whole[gain.name]
    known = _kept(gain, before, cuts) & (after.abs() > 1e-30) & before.isfinite() & after.isfinite()
    ratio = torch.where(known, before / torch.where(known, after, 1.0), torch.nan)
    middle = ratio.nanmedian()
    if not middle.isfinite():
        return None
    if bool(((ratio - middle).abs() <= 1e-6 * middle.abs())[known].all()):
        return middle
    if target.ndim != ratio.ndim or any(n not in (1, m) for n, m in zip(target.shape, ratio.shape, strict=True)):
        return None
    over = [axis for axis, n in enumerate(target.shape) if n == 1]
    scale = ratio.nanmean(over, keepdim=True) if over else ratio
    return torch.where(scale.isnan(), 1.0, scale)


def _zeroed(whole: dict[str, torch.Tensor], cuts: Cuts) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in whole.items():
        for axis, kept in cuts.get(name, {}).items():
            tensor = tensor * _along(kept, axis, tensor)
        tensors[name] = tensor
    return tensors


def _along(kept: Sequence[int], axis: int, like: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(like.shape[axis], dtype=like.dtype, device=like.device)
    mask[list(kept)] = 1
    return mask.reshape([-1 if a == axis else 1 for a in range(like.ndim)])


def _kept(gain: Gain, weight: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    mask = torch.ones_like(weight, dtype=torch.bool)
    for axis, (name, axis_inside) in gain.axes:
        if axis_inside in cuts.get(name, {}):
            mask &= _along(cuts[name][axis_inside], axis, weight).bool()
    return mask


def _run(gain: Gain, leaves: Mapping[str, torch.Tensor], emptied: bool = False) -> torch.Tensor:
    """The made weight; where the leaves are ``emptied``, a removed row divided by its norm is no row of not-a-numbers for the calls after it."""
    results: list[Any] = []

    def read(item: Any) -> Any:
        if isinstance(item, tuple) and item and item[0] == "leaf":
            return leaves[item[1]]
        if isinstance(item, tuple) and item and item[0] == "call":
            return results[item[1]] if isinstance(results[item[1]], torch.Tensor) else results[item[1]][item[2]]
        return [read(inner) for inner in item] if isinstance(item, tuple) else item

    with torch.no_grad():
        for name, arguments in gain.calls:
            short, _, overload = name.partition(".")
            operands = [read(item) for item in arguments]
            if operation(f"aten::{short}").regroups and type(operands[-1]) is list:  # in memory, these tensors may lie in another order than the recorded ones
                result = operands[0].reshape(operands[-1])
            else:
                result = getattr(getattr(torch.ops.aten, short), overload)(*operands)
            if emptied:
                empty = lambda tensor: tensor.nan_to_num(0.0, 0.0, 0.0) if tensor.is_floating_point() else tensor  # noqa: E731
                result = empty(result) if isinstance(result, torch.Tensor) else tuple(map(empty, result))
            results.append(result)
    return results[-1] if isinstance(results[-1], torch.Tensor) else results[-1][gain.result]


# -- finding them ------------------------------------------------------------------------------------------------------------------


def gains_of(graph: Graph, root: Array, cuts: Cuts) -> tuple[Gain, ...]:
    """What takes up the change of every made weight that a norm stands in, where something can; each tensor once. ``root``: the set of every label."""
    gains: dict[str, Gain] = {}
    for weight, nodes in _made(graph):
        gain = _written(graph, root, weight, nodes)
        if gain is None or not any(name in cuts for name in gain.leaves()):
            continue
        inner = _inside(graph, root, weight, nodes)
        while (found := _tried(gain, graph, cuts, gains)) is None and (below := next(inner, None)) is not None:  # a norm in a norm
            further = _tried(below, graph, cuts, gains)
            if further is not None and further.name:
                gains.setdefault(further.name, further)
        if found is not None and found.name:
            gains.setdefault(found.name, found)
    return tuple(gains.values())


def _inside(graph: Graph, root: Array, weight: Value, nodes: list[Node]) -> Iterator[Gain]:
    """The weights that stand inside a made one: of its size, and made by some of its calls."""
    maker = {id(value): at for at, node in enumerate(nodes) for value in node.outs}
    for at, node in enumerate(nodes[:-1]):
        for value in node.outs:
            if node.op.move is None and value is not weight and sorted(value.shape) == sorted(weight.shape):
                needed, waiting = {at}, list(node.held)
                while waiting:
                    before = maker.get(id(waiting.pop()))
                    if before is not None and before not in needed:
                        needed.add(before)
                        waiting += nodes[before].held
                gain = _written(graph, root, value, [nodes[each] for each in sorted(needed)])
                if gain is not None:
                    yield gain


def _made(graph: Graph) -> Iterator[tuple[Value, list[Node]]]:
    """Each weight that a product with an activation uses and that calls make from leaves alone, with these calls in order."""
    maker: dict[int, tuple[int, Node] | None] = {id(leaf): None for leaf in graph.leaves.values()}
    seen: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if node.held and all(id(value) in maker for value in node.held):
            maker.update((id(value), (index, node)) for value in node.outs)
            continue
        computed = [value for value in node.held if maker.get(id(value)) and id(value) not in seen]
        if not computed or node.rule is None:
            continue
        for value in computed:
            seen.add(id(value))
            value = _unmoved(value, maker)
            calls: dict[int, Node] = {}
            waiting = [value]
            while waiting and len(calls) <= MOST:
                made = maker[id(waiting.pop())]
                if made and made[0] not in calls:
                    calls[made[0]] = made[1]
                    waiting += made[1].held
            if len(calls) <= MOST:
                yield value, [calls[at] for at in sorted(calls)]


def _unmoved(value: Value, maker: Mapping[int, tuple[int, Node] | None]) -> Value:
    """The value before what only moves its entries."""
    made = maker[id(value)]
    while made and len(made[1].held) == 1 and made[1].op.move is not None:
        value = made[1].held[0]
        made = maker[id(value)]
    return value


def _written(graph: Graph, root: Array, weight: Value, nodes: list[Node]) -> Gain | None:
    """The calls as data, or None where one of them is not of those that a plan may hold."""
    made = {id(value): (at, out) for at, node in enumerate(nodes) for out, value in enumerate(node.outs)}
    if not any(node.op.statistic or node.products for node in nodes) or not all(node.op.planned for node in nodes):
        return None
    names = {id(leaf): name for name, leaf in graph.leaves.items()}

    def write(item: Any) -> Any:
        if isinstance(item, Value):
            return ("leaf", names[id(item)]) if id(item) in names else ("call", *made[id(item)])
        if isinstance(item, list | tuple):
            return tuple(write(inner) for inner in item)
        if item is None or type(item) in (bool, int, float):
            return item
        raise TypeError

    try:
        calls = tuple((f"{node.op.short}.{node.func._overloadname}", tuple(map(write, node.args))) for node in nodes)
    except TypeError:
        return None
    if any(node.kwargs.get(key) is not None for node in nodes for key in node.kwargs if key != "memory_format"):
        return None
    return Gain("", 1.0, calls, made[id(weight)][1], tuple(_follows(graph, root, weight, _leaves([c for _, c in calls]))))


def _follows(graph: Graph, root: Array, weight: Value, leaves: Iterator[str]) -> Iterator[tuple[int, tuple[str, int]]]:
    """For each axis of the weight, the axis of a leaf that carries the same labels."""
    places = [(name, axis, field.ravel()) for name in dict.fromkeys(leaves) for field in graph.leaves[name].fields for axis in [int(np.argmax(field.shape))]]
    for field in weight.fields:
        if field.size != max(field.shape):
            continue
        units = root[field.ravel()]
        place = next(((name, axis) for name, axis, labels in places if len(labels) == len(units) and np.array_equal(root[labels], units)), None)
        if place:
            yield int(np.argmax(field.shape)), place


def _tried(gain: Gain, graph: Graph, cuts: Cuts, others: Mapping[str, Gain]) -> Gain | None:
    """The gain with the tensor that takes the change up, on random tensors; with no name where there is no change, None where nothing takes it up.

    ``others`` take something up already.
    """
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(graph.leaves[name].shape, generator=generator, dtype=torch.float64) for name in gain.leaves()}
    scales: dict[str, torch.Tensor] = {}
    for name, other in others.items():
        if whole.keys() >= set(other.leaves()):
            scales[name] = factor(other, whole, cuts, scales)
    wanted, scaled = _run(gain, whole), _scaled(whole, scales)
    kept = _kept(gain, wanted, cuts)
    if _same(_run(gain, _zeroed(scaled, cuts), True), wanted, kept):
        return gain
    for name in sorted(whole.keys() - scales.keys(), key=lambda name: (whole[name].numel(), name)):
        degree = (_run(gain, whole | {name: whole[name] * 2}) / wanted)[kept].abs().log2().nanmedian()
        if not degree.isfinite() or abs(float(degree)) < 0.1:
            continue
        trial = Gain(name, 1 / round(float(degree), 6), gain.calls, gain.result, gain.axes)
        scale = factor(trial, whole, cuts, scales)
        if _same(_run(gain, _zeroed(scaled | {name: whole[name] * scale}, cuts), True), wanted, kept):
            return trial
    return None


def _same(left: torch.Tensor, right: torch.Tensor, where: torch.Tensor) -> bool:
    return bool(torch.allclose(left[where], right[where], rtol=1e-6, atol=1e-9))
