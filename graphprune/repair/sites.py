"""Where a repair can work: every weight of the run that maps one activation to the next, and what stands around it.

A :class:`Site` is one call of a convolution or a matrix product whose weight is a parameter used once. Behind it may stand a
batch norm (which then carries the intercept), an addition (what is added there belongs to the target), and an activation
that is flat in parts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..operations.notation import Value
from ..tracing.trace import Graph, Node
from ..tracing.trees import tensors

# Calls of the Python code and the places of input, weight and bias among their tensors; whether the weight is (in, out).
CALLS = {
    "conv1d": (0, 1, 2, False),
    "conv2d": (0, 1, 2, False),
    "conv3d": (0, 1, 2, False),
    "conv_transpose1d": (0, 1, 2, False),
    "conv_transpose2d": (0, 1, 2, False),
    "conv_transpose3d": (0, 1, 2, False),
    "linear": (0, 1, 2, False),
    "addmm": (1, 2, 0, True),
    "matmul": (0, 1, None, True),
    "__matmul__": (0, 1, None, True),
    "mm": (0, 1, None, True),
}
PASSING = ("dropout", "dropout_", "feature_dropout", "contiguous")
ADDITIONS = ("add", "__add__", "add_", "__iadd__")


def _bounds(low: float | None = None, high: float | None = None) -> tuple[float, float]:
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


# Between what an activation is not flat, from the arguments of its kernel behind the input.
ENDS: dict[str, Callable[..., tuple[float, float]]] = {
    "relu": lambda: (0.0, math.inf),
    "relu6": lambda: (0.0, 6.0),
    "hardswish": lambda: (-3.0, math.inf),
    "hardsigmoid": lambda: (-3.0, 3.0),
    "hardtanh": lambda low=-1.0, high=1.0: _bounds(low, high),
    "clamp": _bounds,
    "clamp_min": _bounds,
    "clamp_max": lambda high: _bounds(None, high),
}


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
    shape: tuple[list, list, list] | None
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
    found: list[Site] = []
    left: dict[str, str] = {}
    for at, step in enumerate(graph.steps):
        places = CALLS.get(step.name)
        if places is None or len(step.args) <= places[1]:
            if step.name.startswith(("lstm", "gru", "rnn_")):
                weights = [value for value in step.args if value is not None and value.leaf in graph.leaves and len(value.shape) == 2]
                left |= {weight.leaf: "inside a recurrent layer" for weight in weights}
            continue
        x, weight = step.args[places[0]], step.args[places[1]]
        if x is None or weight is None or x.leaf in graph.leaves or not step.results or step.results[0] is None:
            continue
        reason = reader.unfit(weight)
        if reason and id(weight) not in reader.fixed:
            continue  # a product of two activations has no weight
        if reason:
            left[weight.leaf or f"call {at} ({step.name})"] = reason
            continue
        bias = step.args[places[2]] if places[2] is not None and len(step.args) > places[2] else None
        shape, more, reason = reader.geometry(at, x)
        if reason or (bias is not None and reader.unfit(bias)):
            left[weight.leaf] = reason or "its bias is shared or computed"
            continue
        behind = reader.behind(step.results[0], at)
        found.append(Site(at, weight.leaf, bias.leaf if bias is not None else None, x, step.results[0], places[3], shape, *behind, more))
    return found, left


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
    found = []
    for at, step in enumerate(graph.steps):
        result = step.results[0] if step.results else None
        if result is None or step.name not in ("layer_norm", "rms_norm", "mul", "__mul__", "__rmul__"):
            continue
        args = [value for value in step.args if value is not None]
        leaves = [value for value in args if id(value) in reader.leaf and not reader.unfit(value) and len(value.shape) == 1]
        inputs = [value for value in args if id(value) not in reader.fixed]
        if len(inputs) != 1 or not leaves or len(leaves) + 1 != len(args) or len(leaves) > 1 + (step.name == "layer_norm"):
            continue
        if inputs[0].shape != result.shape or leaves[0].shape[0] != result.shape[-1]:
            continue
        norm = step.name if "norm" in step.name else ""
        floats = [arg for node in reader.nodes.get(at, []) for arg in node.args if isinstance(arg, float) and 0 < arg < 0.1]
        bias = leaves[1].leaf if len(leaves) > 1 else None
        found.append(Scale(at, leaves[0].leaf, bias, inputs[0], result, norm, floats[-1] if norm and floats else 0.0))
    return found


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.leaf = {id(value): name for name, value in graph.leaves.items()}
        uses = Counter(id(v) for step in graph.steps for v in {id(v): v for v in step.args if v is not None}.values())
        self.uses = uses
        self.first: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        for at, step in enumerate(graph.steps):
            passed = step.results[0] if step.results and step.name in PASSING else None  # a dropout at rest gives back what it got
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

    def geometry(self, at: int, x: Value) -> tuple[tuple[list, list, list] | None, list[int] | None, str | None]:
        """Stride, padding and dilation of a convolution; what is added to the outputs of a transposed one; or why it is none that can be fitted."""
        name = self.graph.steps[at].name
        if not name.startswith("conv"):
            return None, None, None
        nodes = [n for n in self.nodes.get(at, []) if n.func._schema.name == "aten::convolution"]
        if len(nodes) != 1:
            return None, None, "a convolution in several parts"
        _, _, _, stride, padding, dilation, transposed, more, groups = nodes[0].args
        rank = len(x.shape) - 2
        wide = [list(v) * (rank if len(v) == 1 else 1) for v in (stride, padding, dilation, more)]
        if tuple(nodes[0].args[0].shape) != tuple(x.shape):
            return None, None, "padded in a way of its own"
        if transposed and groups > 1:
            return None, None, "a transposed convolution in groups"
        return (wide[0], wide[1], wide[2]), wide[3] if transposed else None, None

    def behind(self, y: Value, at: int) -> tuple[Norm | None, Value | None, Flat | None]:
        """A batch norm that alone reads y, what is then added to its result, if that is known before the call, and the activation that alone reads that."""
        norm, path = None, [y]
        reader = self.only(y)
        if reader is not None and self.graph.steps[reader].name == "batch_norm":
            norm = self.norm(reader) if self.graph.steps[at].name.startswith("conv") or len(y.shape) == 2 else None  # over the axis that y is written along
            if norm is None:
                return None, None, None
            path.append(self.graph.steps[reader].results[0])
            reader = self.only(path[-1])
        while reader is not None and self.graph.steps[reader].name in PASSING and self.graph.steps[reader].results:
            path.append(self.graph.steps[reader].results[0])
            reader = self.only(path[-1])
        if reader is None or self.graph.steps[reader].name not in ADDITIONS:
            return norm, None, self.flat(path)
        others = [v for v in self.graph.steps[reader].args if v is not None and v is not path[-1]]
        if len(others) != 1 or others[0].shape != y.shape or others[0].leaf or self.first.get(id(others[0]), at) > at or not self.plain(reader):
            return norm, None, None
        return norm, others[0], self.flat([*path, self.graph.steps[reader].results[0]])

    def only(self, value: Value | None) -> int | None:
        """The one call that reads a value."""
        readers = self.readers.get(id(value), []) if value is not None else []
        return readers[0] if len(readers) == 1 and self.kernels.get(id(value), set()) <= {readers[0]} else None

    def plain(self, at: int) -> bool:
        """Whether an addition takes both of its operands as they are."""
        return all(number == 1 for node in self.nodes.get(at, []) for number in (*node.args[2:], *node.kwargs.values()))

    def flat(self, path: list[Value]) -> Flat | None:
        """The activation that alone reads the last value of a path, if it is flat in parts and the path is seen nowhere else."""
        z = path[-1]
        nodes = self.nodes.get(self.only(z), []) if z is not None and z.shape == path[0].shape else []
        if len(nodes) != 1 or any(value.storage in self.shown for value in path):
            return None
        name, (_, *numbers) = nodes[0].func._schema.name.removeprefix("aten::").rstrip("_"), nodes[0].args
        known = name in ENDS and all(number is None or isinstance(number, int | float) for number in numbers)
        return Flat(z, ENDS[name](*numbers)) if known else None

    def norm(self, at: int) -> Norm | None:
        nodes = [n for n in self.nodes.get(at, []) if "batch_norm" in n.func._schema.name]
        if len(nodes) != 1:
            return None
        x, weight, bias, mean, var, *_ = nodes[0].args
        held = [self.leaf.get(id(v)) if isinstance(v, Value) else None for v in (weight, bias, mean, var)]
        if held[2] is None or held[3] is None or any(self.uses[id(v)] > 1 for v in (mean, var)):
            return None
        return Norm(held[0], held[1], held[2], held[3], float(nodes[0].args[-1 if "no_training" in nodes[0].func._schema.name else 7]), x)


def norms(graph: Graph) -> list[tuple[int, Norm]]:
    """Every batch norm with statistics of its own, with its call."""
    reader = _Reader(graph)
    found = [(at, reader.norm(at)) for at, step in enumerate(graph.steps) if step.name == "batch_norm"]
    return [(at, norm) for at, norm in found if norm is not None]
