"""Where a repair can work: every weight of the run that maps one activation to the next, and what stands around it.

A :class:`Site` is one call of a convolution or a matrix product whose weight is a parameter used once. Behind it may stand a
batch norm (which then carries the intercept), an addition (what is added there belongs to the target), and an activation
that is flat in parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..operations.contraction import Product
from ..operations.notation import Value
from ..tracing.graph import Graph
from ..tracing.node import Node
from ..tracing.origin import axis_of
from ..tracing.trees import tensors

# Calls of the Python code that torch may take apart into several operations.
NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class Norm:
    """The parameters and statistics of a batch norm, by name (None where it has none)."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float
    x: Value


@dataclass(frozen=True)
class Flat:
    """An activation that passes z on only between two ends."""

    z: Value
    ends: tuple[float, float]


@dataclass(frozen=True)
class Site:
    """One call that a weight makes: ``y = W x + b``. ``shape``: (stride, padding, dilation) of a convolution; behind it norm, addition, activation.

    ``more``: of a transposed convolution, what is added to the length of its outputs along each axis (None: not transposed).
    """

    step: int
    weight: str
    bias: str | None
    x: Value
    y: Value
    turned: bool
    shape: tuple[list[Any], list[Any], list[Any]] | None
    norm: Norm | None
    other: Value | None
    flat: Flat | None = None
    more: list[int] | None = None

    @property
    def axis(self) -> int:
        """The axis of the weight along which the outputs stand."""
        return 1 if self.turned or self.more is not None else 0

    def by_output(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with its outputs first: (outputs, inputs, …)."""
        return weight.transpose(0, 1) if self.axis else weight


def sites(graph: Graph) -> tuple[list[Site], dict[str, str]]:
    """The sites in the order of the run, and why a weight that looks like one is none."""
    reader = _Reader(graph)
    usable: list[Site] = []
    refused: dict[str, str] = {}
    for at, step in enumerate(graph.steps):
        calls = [node for node in reader.nodes.get(at, []) if node.products]
        product = calls[0].product if len(calls) == 1 else None
        if calls and product is None:
            weights = [value for value in step.args if value is not None and value.leaf in graph.leaves and len(value.shape) > 1]
            refused |= {weight.leaf: "inside a recurrent layer, or another call of several products" for weight in weights}
        elif product is not None and step.results and step.results[0] is not None:
            site, weight, reason = reader.site(at, calls[0], product)
            if site is not None:
                usable.append(site)
            elif reason:
                refused[weight.leaf or f"call {at} ({step.name})"] = reason
    return usable, refused


@dataclass(frozen=True)
class Scale:
    """A scale (and shift) for each channel of the last axis, ``y = weight · n(x) + bias``: behind a norm over those channels, or alone."""

    step: int
    weight: str
    bias: str | None
    x: Value
    y: Value
    norm: str  # "layer_norm", "rms_norm", or "" where x is scaled as it is
    eps: float


def scales(graph: Graph) -> list[Scale]:
    """The scales in the order of the run: of layer norms, and of products with a parameter (root-mean-square norms spelled out)."""
    reader = _Reader(graph)
    calls = (reader.scale(at) for at in range(len(graph.steps)))
    return [scale for scale in calls if scale is not None]


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.leaf = {id(value): name for name, value in graph.leaves.items()}
        uses = Counter(id(v) for step in graph.steps for v in {id(v): v for v in step.args if v is not None}.values())
        self.uses = uses
        self.first: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        for at, step in enumerate(graph.steps):
            passed = step.results[0] if step.results else None  # a dropout at rest gives back what it got, and reads nothing
            for value in step.args:
                if value is not None:
                    self.first.setdefault(id(value), at)
                    if value is not passed:
                        self.readers.setdefault(id(value), []).append(at)
            for value in step.results:
                if value is not None:
                    self.first.setdefault(id(value), at + 1)  # a result is there for the next call
        self.fixed = set(self.leaf)  # what does not depend on the inputs
        self.nodes: dict[int, list[Node]] = {}
        self.kernels: dict[int, set[int]] = {}  # the calls whose kernels read a value; -1 for an attribute such as .T or .data
        self.shown = {value.storage for value in graph.outputs}
        for node in graph.nodes:
            for value in node.held:
                self.kernels.setdefault(id(value), set()).add(node.step)
            self.nodes.setdefault(node.step, []).append(node)
            if all(id(value) in self.fixed for value in tensors((node.args, node.kwargs))):
                self.fixed |= {id(value) for value in node.outs}

    def unfit(self, value: Value) -> str | None:
        if id(value) not in self.leaf:
            return "computed from other parameters"
        if value.leaf.startswith("<"):
            return "a constant"
        return "used more than once" if self.uses[id(value)] > 1 else None

    def site(self, at: int, node: Node, product: Product) -> tuple[Site | None, Value, str]:
        """The site of a call that is one product, or its weight and why it is none (no reason: it has no weight at all)."""
        result = self.graph.steps[at].results[0]
        weight, x = (self.given(at, operand.value) for operand in (product.weight, product.input))
        weight = weight if weight is not None else product.weight.value
        if id(weight) not in self.fixed or (x is not None and x.leaf in self.graph.leaves):
            return None, weight, ""  # a product of two activations, or of two weights
        bias = self.given(at, product.bias) if product.bias is not None else None
        axis = axis_of(weight, product.weight.value, product.weight.made[0]) if len(product.weight.made) == 1 else None
        steps, margin = self.stepping(node, product, x)
        reason = self.unfit(weight) or self.unlike(node, product, axis) or self.unread(product, x, bias) or self.unstepped(product, steps, margin)
        if reason or x is None or result is None:
            return None, weight, reason or "padded in a way of its own"
        turned = axis == 1 and not product.spreads
        norm, added, flat = self.behind(result, at, steps is not None)
        name = bias.leaf if bias is not None else None
        return Site(at, weight.leaf, name, x, result, turned, steps, norm, added, flat, margin if product.spreads else None), weight, ""

    def stepping(self, node: Node, product: Product, x: Value | None) -> tuple[tuple[list[Any], list[Any], list[Any]] | None, list[int] | None]:
        """How a kernel goes over its input, and what a transposed one adds at the end of its output; nothing where there is no kernel."""
        if x is None or not product.weight.taps:
            return None, None
        rank = len(x.shape) - 2
        return self.geometry(node, rank), self.numbers(node, "output_padding", rank)

    @staticmethod
    def unstepped(product: Product, steps: tuple[Any, ...] | None, margin: list[int] | None) -> str:
        """Why it is not known which inputs a kernel meets."""
        unknown = product.weight.taps and (steps is None or (product.spreads and margin is None))
        return "a kernel whose steps are not known" if unknown else ""

    def scale(self, at: int) -> Scale | None:
        """The scale of a call that is a layer norm, or a product with one parameter along the last axis."""
        step = self.graph.steps[at]
        result = step.results[0] if step.results else None
        norm = step.name if step.name in NORMS else ""
        if result is None or not (norm or self.multiplies(at)):
            return None
        x, vectors = self.operands(at)
        if x is None or len(vectors) not in ((1, 2) if norm == "layer_norm" else (1,)):
            return None
        weight, *bias = vectors
        if x.shape != result.shape or weight.shape[0] != result.shape[-1]:
            return None
        return Scale(at, weight.leaf, bias[0].leaf if bias else None, x, result, norm, self.epsilon(at) if norm else 0.0)

    def operands(self, at: int) -> tuple[Value | None, list[Value]]:
        """The one activation that a call works on, and its parameters with one axis; no activation where it has other operands too."""
        args = [value for value in self.graph.steps[at].args if value is not None]
        vectors = [value for value in args if not self.unfit(value) and len(value.shape) == 1]
        inputs = [value for value in args if id(value) not in self.fixed]
        return (inputs[0] if len(inputs) == 1 and len(vectors) + 1 == len(args) else None), vectors

    def epsilon(self, at: int) -> float:
        """What a norm adds to the statistic that it divides by: its last small number."""
        small = [number for node in self.nodes.get(at, []) for number in node.args if isinstance(number, float) and 0 < number < 0.1]
        return small[-1] if small else 0.0

    @staticmethod
    def unlike(node: Node, product: Product, axis: int | None) -> str:
        """Why a product is not what rows can be written of, outputs along the last axis, or the second of a convolution."""
        if product.spreads and product.groups > 1:
            return "a transposed convolution in groups"
        if product.others or axis is None or len(product.weight.summed) != 1 or not product.shared <= product.rule.sizes.keys():
            return "a product of more than one weight"
        outs, inputs = (1, 1) if product.weight.taps else (len(node.outs[0].shape) - 1, len(product.input.value.shape) - 1)
        return "" if product.out == outs and product.input.summed == (inputs,) else "its channels stand along another axis"

    def unread(self, product: Product, x: Value | None, bias: Value | None) -> str:
        """Why what a product reads is not what the call was given."""
        if x is None or (product.weight.taps and tuple(product.input.value.shape) != tuple(x.shape)):
            return "padded in a way of its own"
        return "its bias is shared or computed" if product.bias is not None and (bias is None or self.unfit(bias)) else ""

    def given(self, at: int, value: Value) -> Value | None:
        """The argument of a call that an operand of its kernel is, but for movement inside of the call."""
        args = {id(arg) for arg in self.graph.steps[at].args if arg is not None}
        while id(value) not in args:
            node = self.graph.nodes[value.node] if value.node >= 0 else None
            if node is None or node.step != at or not node.is_move or len(node.held) != 1:
                return None
            value = node.held[0]
        return value

    def geometry(self, node: Node, rank: int) -> tuple[list[Any], list[Any], list[Any]] | None:
        """Stride, padding and dilation of a convolution along each axis of space."""
        stride, padding, dilation = (self.numbers(node, name, rank) for name in ("stride", "padding", "dilation"))
        return (stride, padding, dilation) if stride and padding and dilation else None

    @staticmethod
    def numbers(node: Node, name: str, rank: int) -> list[int] | None:
        """A number for each axis of space, by the name of the argument."""
        value = node.argument(name)
        return list(value) * (rank if len(value) == 1 else 1) if isinstance(value, list | tuple) else None

    def behind(self, y: Value, at: int, convolution: bool) -> tuple[Norm | None, Value | None, Flat | None]:
        """A batch norm that alone reads y, what is then added to its result, if that is known before the call, and the activation that alone reads that."""
        norm: Norm | None = None
        path: list[Value | None] = [y]
        reader = self.only(y)
        if reader is not None and self.batch_norms(reader):
            norm = self.norm(reader) if convolution or len(y.shape) == 2 else None  # over the axis that y is written along
            if norm is None:
                return None, None, None
            path.append(self.graph.steps[reader].results[0])
            reader = self.only(path[-1])
        while reader is not None and self.passes(reader):
            path.append(self.graph.steps[reader].results[0])
            reader = self.only(path[-1])
        if reader is None or not self.adds(reader):
            return norm, None, self.flat(path)
        others = [v for v in self.graph.steps[reader].args if v is not None and v is not path[-1]]
        if len(others) != 1 or others[0].shape != y.shape or others[0].leaf or self.first.get(id(others[0]), at) > at or not self.plain(reader):
            return norm, None, None
        return norm, others[0], self.flat([*path, self.graph.steps[reader].results[0]])

    def passes(self, at: int) -> bool:
        """Whether a call gives back what it got (a dropout at rest, a copy)."""
        nodes = self.nodes.get(at, [])
        return bool(self.graph.steps[at].results) and all(node.op.stays for node in nodes)

    def adds(self, at: int) -> bool:
        return [node.op.arithmetic for node in self.nodes.get(at, [])] == ["add"]

    def multiplies(self, at: int) -> bool:
        return [node.op.arithmetic for node in self.nodes.get(at, [])] == ["mul"]

    def batch_norms(self, at: int) -> list[Node]:
        return [node for node in self.nodes.get(at, []) if node.op.norm == "batch"]

    def only(self, value: Value | None) -> int | None:
        """The one call that reads a value."""
        readers = self.readers.get(id(value), []) if value is not None else []
        return readers[0] if len(readers) == 1 and self.kernels.get(id(value), set()) <= {readers[0]} else None

    def plain(self, at: int) -> bool:
        """Whether an addition takes both of its operands as they are."""
        return all(number == 1 for node in self.nodes.get(at, []) for number in (*node.args[2:], *node.kwargs.values()))

    def flat(self, path: Sequence[Value | None]) -> Flat | None:
        """The activation that alone reads the last value of a path, if it is flat in parts and the path is seen nowhere else."""
        values = [value for value in path if value is not None]
        z, reader = values[-1], self.only(values[-1])
        nodes = self.nodes.get(reader, []) if reader is not None and len(values) == len(path) and z.shape == values[0].shape else []
        if len(nodes) != 1 or any(value.storage in self.shown for value in values):
            return None
        ends, (_, *numbers) = nodes[0].op.flat, nodes[0].args
        if ends is None or not all(number is None or isinstance(number, int | float) for number in numbers):
            return None
        return Flat(z, ends(*numbers))

    def norm(self, at: int) -> Norm | None:
        calls = self.batch_norms(at)
        norm = calls[0].norm if len(calls) == 1 else None
        if norm is None:
            return None
        names = [self.leaf.get(id(value)) for value in (norm.weight, norm.bias, norm.mean, norm.var)]
        if names[2] is None or names[3] is None or any(self.uses[id(value)] > 1 for value in (norm.mean, norm.var)):
            return None
        return Norm(names[0], names[1], names[2], names[3], norm.eps, norm.x)


def norms(graph: Graph) -> list[tuple[int, Norm]]:
    """Every batch norm with statistics of its own, with its call."""
    reader = _Reader(graph)
    calls = [(at, reader.norm(at)) for at in range(len(graph.steps)) if reader.batch_norms(at)]
    return [(at, norm) for at, norm in calls if norm is not None]
