"""What a network's own weights and statistics say about its activations, without data: means and covariances of channels.

Batch-norm scales and shifts are means and deviations (Nagel et al. 2019), layer norms nearly so; a weight carries the covariance of what it
reads to what it writes; and behind a function of one value, Mehler's formula gives the covariance of two correlated normal values from its
Hermite coefficients. Where nothing is known (the input, an attention's result) channels count as independent, with mean 0 and deviation 1.

>>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
>>> _ = torch.nn.init.eye_(net[0].weight)
>>> graph = trace(net, torch.zeros(1, 2))
>>> found = beliefs(graph, {"0.weight": net[0].weight.detach()})[id(graph.outputs[0])]
>>> round(float(found.mean[0]), 3), round(float(found.cov[0, 0]), 3), float(found.cov[0, 1])
(0.399, 0.341, 0.0)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..operations.contraction import Product
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.node import Node, Norm
from ..tracing.trace import trace
from ..tracing.trees import replace as exchange
from ..tracing.trees import tensors

__all__ = ["Belief", "beliefs", "carried", "trace"]

Tensor = torch.Tensor
ORDERS = 12
NEAR = 0.5  # how much neighbouring positions of a map say the same
WIDEST = 4096  # channels whose covariance is kept whole


@dataclass(frozen=True)
class Belief:
    """Mean (C,) and covariance (C, C) of the channels along ``axis``.

    ``energy``: the squares (C,) whose mean a norm divided by; ``each``: how many positions in a row every channel has (behind a flatten).
    """

    mean: Tensor
    cov: Tensor
    axis: int
    energy: Tensor | None = None
    each: int = 1

    @property
    def deviation(self) -> Tensor:
        return self.cov.diagonal().clamp(min=0).sqrt()

    @property
    def correlation(self) -> Tensor:
        scale = self.deviation.clamp(min=torch.finfo(torch.float64).tiny).reciprocal()
        return (self.cov * scale[:, None] * scale).clamp(-1, 1)


def unknown(count: int, axis: int) -> Belief:
    """Independent channels with mean 0 and deviation 1."""
    return Belief(torch.zeros(count, dtype=torch.float64), torch.eye(count, dtype=torch.float64), axis)


def beliefs(graph: Graph, weights: Mapping[str, Tensor], wanted: Collection[int] | None = None) -> dict[int, Belief]:
    """By the id of each value of the run, what is known of its channels; ``weights`` are the model's tensors by name.

    With ``wanted`` (ids of values) what is known of any other is let go once it was read last, but for the energy that a norm divided by: the covariances
    of a long run (a recurrent layer, step by step) would not fit into memory.
    """
    reader = _Reader(graph, weights)
    last = {id(value): index for index, node in enumerate(graph.nodes) for value in (*node.outs, *tensors((node.args, node.kwargs)))}
    for index, node in enumerate(graph.nodes):
        reader.read(node)
        if wanted is None:
            continue
        for value in (*node.outs, *tensors((node.args, node.kwargs))):
            belief = reader.beliefs.get(id(value))
            if belief is None or last[id(value)] != index or id(value) in wanted:
                continue
            if belief.energy is None:
                del reader.beliefs[id(value)]
            else:
                reader.beliefs[id(value)] = replace(belief, cov=torch.empty(0, 0, dtype=torch.float64))
    return reader.beliefs


def carried(weight: Tensor, belief: Belief, depthwise: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``W x``: weight (outputs, inputs, taps), or (channels, 1, taps) where each channel has its own kernel."""
    weight = weight.double()
    total = weight.sum(2)
    if depthwise:
        flat, total = weight[:, 0], total[:, 0]
        return total * belief.mean, belief.cov * ((1 - NEAR) * flat @ flat.T + NEAR * total[:, None] * total)
    apart = sum(weight[:, :, t] @ belief.cov @ weight[:, :, t].T for t in range(weight.shape[2]))
    return total @ belief.mean, (1 - NEAR) * apart + NEAR * (total @ belief.cov @ total.T)


class _Reader:
    def __init__(self, graph: Graph, weights: Mapping[str, Tensor]) -> None:
        constants = graph.constants
        self.known = {id(v): (weights[n] if n in weights else constants[n]).detach() for n, v in graph.leaves.items() if n in weights or n in constants}
        self.beliefs: dict[int, Belief] = {}
        self.alive: list[Any] = []

    def read(self, node: Node) -> None:
        operands = list(tensors((node.args, node.kwargs)))
        if not operands or not node.outs:
            return
        out = node.outs[0]
        if all(id(v) in self.known for v in operands):
            if len(node.outs) == 1 and not node.op.writes:
                self.known[id(out)] = node.func(*exchange(node.args, self.tensor), **exchange(node.kwargs, self.tensor))
            return
        belief = self.known_of(node, out, operands)
        if belief is not None and len(belief.mean) * belief.each == out.shape[belief.axis]:
            self.beliefs[id(out)] = belief

    def known_of(self, node: Node, out: Value, operands: list[Value]) -> Belief | None:
        if node.product is not None:
            return self.product(node.product, out)
        if node.norm is not None and node.norm.kind != "rms":
            return self.normal(node.norm, node, out)
        if node.op.arithmetic in ("add", "sub"):
            return self.add(node, out)
        return self.mul(node, out) if node.op.arithmetic == "mul" else self.other(node, out, operands)

    def tensor(self, value: Value) -> Tensor:
        return self.known[id(value)].cpu()

    def vector(self, value: Value | None, count: int, other: float) -> Tensor:
        return self.known[id(value)].double().cpu() if value is not None and id(value) in self.known else torch.full((count,), other, dtype=torch.float64)

    def reads(self, x: Value, count: int, axis: int) -> Belief:
        belief = self.beliefs.get(id(x))
        return belief if belief is not None and len(belief.mean) * belief.each == count else unknown(count, axis)

    def product(self, product: Product, out: Value) -> Belief | None:
        """What a weight makes of what it reads: one axis of the weight is summed, one is its own, others are taps of a kernel."""
        weight, axis = product.weight, product.out
        if id(weight.value) not in self.known or axis < 0 or len(weight.summed) != 1 or product.others or product.spreads:
            return None
        if not product.shared <= product.rule.sizes.keys() or max(*product.input.value.shape[1:2], *weight.value.shape) > WIDEST:
            return None
        outs, inputs = weight.value.shape[weight.made[0]], weight.value.shape[weight.summed[0]]
        depthwise = product.groups == outs > 1 and inputs == 1
        if product.groups > 1 and not depthwise:
            return None
        before = self.reads(product.input.value, outs if depthwise else inputs, axis)
        kernel = self.tensor(weight.value).movedim((weight.made[0], weight.summed[0]), (0, 1))
        kernel = kernel.reshape(outs, -1, before.each) if before.each > 1 else kernel.reshape(outs, inputs, -1)
        mean, cov = carried(kernel, before, depthwise)
        return Belief(mean + self.vector(product.bias, len(mean), 0.0), cov, axis)

    def normal(self, norm: Norm, node: Node, out: Value) -> Belief | None:
        axis = 1
        if norm.kind == "layer":
            axis = len(out.shape) - 1
            if len(node.argument("normalized_shape")) != 1:
                return None
        count = out.shape[axis]
        if count > WIDEST:
            return None
        before = self.reads(norm.x, count, axis)
        before = unknown(count, axis) if before.each > 1 else before
        scale = self.vector(norm.weight, count, 1.0)
        centred = before.mean - before.mean.mean()
        cov = before.correlation * scale[:, None] * scale
        return Belief(self.vector(norm.bias, count, 0.0), cov, axis, before.cov.diagonal() + centred.square())

    def add(self, node: Node, out: Value) -> Belief | None:
        one, two = node.args[:2]
        first, other = self.beliefs.get(id(one)), self.beliefs.get(id(two)) if isinstance(two, Value) else None
        sign = -1.0 if node.op.arithmetic == "sub" else 1.0
        factor = sign * float(node.kwargs.get("alpha", 1))
        if any(b is not None and b.each > 1 for b in (first, other)):
            return None
        if not isinstance(two, Value):
            return first and replace(first, mean=first.mean + factor * float(two), energy=None)
        if first is not None and other is not None and first.axis == other.axis and len(first.mean) == len(other.mean):
            return Belief(first.mean + factor * other.mean, first.cov + factor**2 * other.cov, first.axis)
        known, rest = (first, two) if first is not None else (other, one)
        if known is None or id(rest) not in self.known:
            return known and self.along(known, out) and replace(known, energy=None)
        shift = self.tensor(rest).double()
        shift = shift.reshape((1,) * (len(out.shape) - shift.ndim) + tuple(shift.shape)).movedim(known.axis, -1)
        return replace(known, mean=known.mean + shift.flatten(0, -2).mean(0), energy=None)

    def mul(self, node: Node, out: Value) -> Belief | None:
        one, two = node.args[:2]
        first = self.beliefs.get(id(one)) if isinstance(one, Value) else None
        other = self.beliefs.get(id(two)) if isinstance(two, Value) else None
        if any(b is not None and b.each > 1 for b in (first, other)):
            return None
        if first is not None and other is not None:
            if first.axis != other.axis or len(first.mean) != len(other.mean):
                return None
            seconds = [b.cov + b.mean[:, None] * b.mean for b in (first, other)]
            mean = first.mean * other.mean
            return Belief(mean, seconds[0] * seconds[1] - mean[:, None] * mean, first.axis)
        known, rest = (first, two) if first is not None else (other, one)
        if known is None:
            return None
        if not isinstance(rest, Value):
            return Belief(known.mean * float(rest), known.cov * float(rest) ** 2, known.axis)
        if id(rest) in self.known:
            scale = self.tensor(rest).double()
            scale = scale.reshape((1,) * (len(out.shape) - scale.ndim) + tuple(scale.shape)).movedim(known.axis, -1).flatten(0, -2).mean(0)
            return Belief(known.mean * scale, known.cov * scale[:, None] * scale, known.axis, known.energy)
        if len(rest.shape) == len(out.shape) and rest.shape[known.axis] == 1:  # the same factor for all channels: a norm's
            energy = known.cov.diagonal() + known.mean.square()
            size = energy.mean().clamp(min=torch.finfo(torch.float64).tiny)
            return Belief(known.mean / size.sqrt(), known.cov / size, known.axis, energy)
        return None

    def other(self, node: Node, out: Value, operands: list[Value]) -> Belief | None:
        """A function of one value, or a move or a pool that leaves the channels in a row."""
        known = [self.beliefs[id(v)] for v in operands if id(v) in self.beliefs]
        if len(operands) != 1 or len(known) != 1:
            return None
        if not node.is_pointwise:
            return self.along(known[0], out, operands[0])
        if out.shape != operands[0].shape:
            return None
        return _through(known[0], lambda z: node.func(*exchange(node.args, lambda _: z), **node.kwargs))

    def along(self, belief: Belief, out: Value, before: Value | None = None) -> Belief | None:
        """The axis of a result along which the same labels stand."""
        if before is None:
            return belief
        flat_fields = [f.ravel() for f in before.fields if f.shape[belief.axis] == f.size > 1]
        for field in out.fields:
            for labels in flat_fields:
                flat = field.ravel()
                if field.size % labels.size == 0 and belief.each == 1 and (flat.reshape(labels.size, -1) == labels[:, None]).all():
                    return replace(belief, axis=next(a for a, n in enumerate(field.shape) if n > 1), each=field.size // labels.size)
        return None


def _through(belief: Belief, function: Any) -> Belief | None:
    """Mehler: ``cov(f(z_i), f(z_j)) = Σ_k c_ik c_jk ρ_ij^k`` with ``c_k`` the coefficients of f by normalised Hermite polynomials."""
    points = torch.linspace(-6, 6, 481, dtype=torch.float64)
    weights = torch.exp(-points.square() / 2)
    weights = weights / weights.sum()
    polynomials = [torch.ones_like(points), points]
    for k in range(1, ORDERS):
        polynomials.append((points * polynomials[k] - math.sqrt(k) * polynomials[k - 1]) / math.sqrt(k + 1))
    try:
        values = function(belief.mean + points[:, None] * belief.deviation).double()
    except (RuntimeError, TypeError):  # the call needs more than these numbers: nothing is believed of it, and its readers stay as they are
        return None
    if values.shape != (len(points), len(belief.mean)) or not bool(torch.isfinite(values).all()):
        return None
    coefficients = torch.stack(polynomials[: ORDERS + 1]) * weights @ values  # (orders, C)
    mean = coefficients[0]
    rest = (weights @ (values - mean).square() - coefficients[1:].square().sum(0)).clamp(min=0).sqrt()
    rho, power, cov = belief.correlation, torch.ones_like(belief.cov), torch.zeros_like(belief.cov)
    for c in (*coefficients[1:], rest):
        power = power * rho
        cov = cov + power * c[:, None] * c
    return Belief(mean, cov, belief.axis, each=belief.each)
