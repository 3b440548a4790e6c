"""One run of the model, without values, in which labels ride along: :func:`trace` returns the :class:`Graph`.

The run happens on a throw-away copy whose floating parameters lie on the meta device, under a dispatch mode that sees
every ATen operation and a function mode that sees what sizes the Python code asked for. Where control flow depends on
values, the run is repeated with real ones.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .assemble import ASSEMBLE, free
from .errors import BadInput, GraphpruneError
from .labels import Fields, Labels, Reason
from .moves import MOVES
from .notation import Value, meet
from .rules import RULES, pointwise
from .sizes import Size
from .symbols import Call, calls_of, plant
from .trees import leaf_tensors, normal_inputs, replace, tensors

# Pointwise operations whose overloads lack torch's tag.
UNTAGGED = frozenset(
    "copy where masked_fill lerp addcmul addcdiv clamp hardswish hardsigmoid hardtanh relu6 silu gelu leaky_relu elu "
    "selu celu softplus mish prelu _prelu_kernel glu_none rsub nan_to_num bitwise_not logical_not erf log_sigmoid_forward".split()
)
# Calls that turn a size into a factor of the function: it may not change.
FACTORS = frozenset("mul div true_divide add sub rsub pow __mul__ __rmul__ __truediv__ __rtruediv__ __add__ mul_ div_ rdiv".split())
# Moves that take parts of an axis.
PARTS = frozenset("slice split split_with_sizes unsafe_split unsafe_split_with_sizes split_with_sizes_copy narrow".split())
# What asks a tensor for a property: these calls are no steps of the model.
UNSTEPPED = frozenset("__get__ size dim numel __len__ is_floating_point is_complex stride data_ptr element_size get_device".split())
HERE, TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)


@dataclass
class Node:
    """One ATen call: what it is, its arguments (tensors as Value), its results, and where it was made."""

    func: Any
    args: tuple
    kwargs: dict
    outs: list[Value]
    module: str
    line: str
    reduces: bool = False
    step: int = -1


@dataclass(frozen=True)
class Step:
    """One call of the Python code: its name, and the values of its tensor arguments and of its results, in order."""

    name: str
    args: tuple[Value | None, ...]
    results: tuple[Value | None, ...]


@dataclass(frozen=True)
class Graph:
    """What a model computes: the calls in order, the leaves (parameters, buffers, constants) and all labels."""

    nodes: list[Node]
    steps: list[Step]
    leaves: dict[str, Value]
    labels: Labels
    inputs: list[Value]
    outputs: list[Value]
    calls: list[Call]
    floats: list
    equals: list
    outcomes: list
    symbols: dict
    example: tuple[tuple, dict]

    def to_networkx(self) -> Any:
        """The dependency graph: one node per call (with its operation, module and line), one edge per tensor."""
        import networkx

        graph = networkx.DiGraph()
        for index, node in enumerate(self.nodes):
            graph.add_node(index, op=str(node.func), module=node.module, line=node.line)
            for value in tensors((node.args, node.kwargs)):
                if value.node >= 0:
                    graph.add_edge(value.node, index)
                elif value.leaf:
                    graph.add_edge(value.leaf, index)
        return graph


def shadow(model: nn.Module, real: bool) -> tuple[nn.Module, dict[int, str]]:
    """A throw-away copy that shares or drops the weights, and the name of every tensor in it."""
    memo: dict[int, Any] = {}
    for _, _, _, tensor in leaf_tensors(model):
        if id(tensor) in memo:
            continue
        data = tensor.detach()
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(data.clone() if real else data.to("meta"), requires_grad=False)
        else:
            memo[id(tensor)] = data.clone() if real or not data.is_floating_point() else data.to("meta")
    twin = copy.deepcopy(model, memo).eval()
    names: dict[int, str] = {}
    for name, _, _, tensor in leaf_tensors(twin):
        names.setdefault(id(tensor), name)
    return twin, names


class Recorder(TorchDispatchMode):
    """Sees every ATen call, carries the labels across it, and writes the node down."""

    def __init__(self, labels: Labels, names: dict[int, str], stack: list[str], real: bool) -> None:
        super().__init__()
        self.labels, self.names, self.stack, self.real = labels, names, stack, real
        self.values: dict[int, Value] = {}
        self.alive: list[Any] = []
        self.leaves: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.step = -1

    def leaf(self, tensor: torch.Tensor, name: str) -> Value:
        held = free(self.labels, tuple(tensor.shape), range(tensor.ndim))
        value = Value(tuple(tensor.shape), held, zero=True, leaf=name)
        self.leaves[name] = value
        self.keep(tensor, value)
        return value

    def keep(self, tensor: torch.Tensor, value: Value) -> None:
        self.values[id(tensor)] = value
        self.alive.append(tensor)

    def value(self, tensor: torch.Tensor) -> Value:
        found = self.values.get(id(tensor))
        if found is None:
            name = self.names.get(id(tensor))
            found = self.leaf(tensor, name) if name else Value(tuple(tensor.shape), leaf="")
            if not name:
                self.leaves[f"<constant {len(self.leaves)}>"] = found
                found.leaf = f"<constant {len(self.leaves) - 1}>"
                self.constants[found.leaf] = tensor
                self.keep(tensor, found)
        return found

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        return self.__dict__.setdefault("_constants", {})

    def line(self) -> str:
        frame = sys._getframe(2)
        while frame and (frame.f_code.co_filename.startswith((HERE, TORCH)) or frame.f_code.co_filename[0] == "<"):
            frame = frame.f_back
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Execute: on the meta device as soon as one operand lies there."""
        if self.real:
            return func(*args, **kwargs)
        given = list(tensors((args, kwargs), torch.Tensor))
        if func is torch.ops.aten.native_batch_norm.default and given[0].is_meta and args[5] is False:
            # Without values there is nothing to compute, and torch's own shape function takes milliseconds.
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        if any(t.is_meta for t in given):
            if func._schema.name.endswith("_") and given and not given[0].is_meta:
                return given[0]
            swap = lambda t: t if t.is_meta else t.to("meta")  # noqa: E731
            args, kwargs = replace(args, swap), replace(kwargs, swap)
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
        elif str(kwargs.get("device", "")) == "meta" and not given:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        elif str(kwargs.get("device", "")) == "meta":
            kwargs = {**kwargs, "device": given[0].device}
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        seen = replace(args, self.value), replace(kwargs, self.value)
        before = tuple(args)
        result = self.run(func, args, kwargs)
        results = list(tensors(result, torch.Tensor))
        if not results:
            return result
        shapes = [tuple(t.shape) for t in results]
        module, line = (self.stack[-1] if self.stack else ""), self.line()
        try:
            outs, reduces = self.carry(func, seen[0], seen[1], shapes, module, line)
        except (GraphpruneError, ValueError, IndexError, KeyError, TypeError) as error:
            outs, reduces = self.refuse(func, seen, len(shapes), module, line, f"not understood: {error}")
        if any(n not in (1, size) for s, f in zip(shapes, outs, strict=True) for a in f for n, size in zip(a.shape, s, strict=True)):
            outs, reduces = self.refuse(
                func, (seen, [Value(s, f) for s, f in zip(shapes, outs, strict=True)]), len(shapes), module, line, "its rule does not fit"
            )
        values = [Value(s, f, node=len(self.nodes)) for s, f in zip(shapes, outs, strict=True)]
        name = func._schema.name.rpartition("::")[2]
        if name in MOVES or name in ("select", "unbind", "expand"):
            first = next(tensors(seen), None)
            for value in values:
                value.zero = bool(first and first.zero and name not in ("ones_like", "full_like", "empty_like", "fill_"))
        for tensor, value in zip(results, values, strict=True):
            if before and tensor is before[0] and func._schema.is_mutable:
                value.zero = False
            self.keep(tensor, value)
        self.nodes.append(Node(func, seen[0], seen[1], values, module, line, reduces, self.step))
        return result

    def carry(self, func: Any, args: tuple, kwargs: dict, shapes: list, module: str, line: str) -> tuple[list[Fields], bool]:
        given = list(tensors((args, kwargs)))
        name = func._schema.name.rpartition("::")[2]
        reason = self.labels.reason(Reason("meets an axis that keeps its size", name, module, line))
        if name in ("zeros", "ones", "full", "empty", "rand", "randn") and not given:
            return ASSEMBLE[name](self.labels, reason, shapes, *args, **kwargs), False
        if not any(value.fields for value in given) and not name.startswith("new_") and name not in ("expand", "repeat"):
            return [()] * len(shapes), False
        plain = name[:-1] if name.endswith("_") and name[:-1] in RULES else name
        if name in ASSEMBLE:
            return ASSEMBLE[name](self.labels, reason, shapes, *args, **kwargs), False
        if name in MOVES:
            source, rest = args[0], args[1:]
            moved = [MOVES[name](f, source.shape, shapes, *rest, **kwargs) for f in source.fields]
            outs = [tuple(column) for column in zip(*moved, strict=True)] or [()] * len(shapes)
            self.box(outs)
            if name in PARTS:
                self.singled(source, outs, shapes, reason)
            return outs, False
        if plain in RULES:
            described = RULES[plain](*args, **kwargs)
            outs, reduces = meet(self.labels, described, shapes, reason)
            weight = next((v for v in described.operands[1:] if isinstance(v, Value)), None)
            linear = "[" not in described.text and weight is not None and (weight.zero or described.operands[0].zero)
            return outs + [()] * (len(shapes) - len(outs)), reduces and not linear
        if torch.Tag.pointwise in func.tags or is_pointwise(func, name):
            ranked = [v for v in given if v.shape] or given
            if len(ranked) == 1 and len(ranked[0].shape) == len(shapes[0]):
                return [ranked[0].fields for _ in shapes], False
            return meet(self.labels, pointwise(ranked, [len(s) for s in shapes]), shapes, reason)
        if name == "as_strided_" and shapes[0] == args[0].shape and sum(n > 1 for n in shapes[0]) < 2:
            return [args[0].fields], False
        return self.refuse(func, (args, kwargs), len(shapes), module, line, "no rule for this operation")

    def refuse(self, func: Any, given: Any, count: int, module: str, line: str, text: str) -> tuple[list[Fields], bool]:
        """Lock what an operation touches, and only that."""
        unknown = self.labels.reason(Reason(text, func._schema.name.rpartition("::")[2], module, line))
        for value in tensors(given):
            for held in value.fields:
                self.labels.lock(held, unknown)
        return [()] * count, False

    def singled(self, source: Value, outs: list[Fields], shapes: list, reason: int) -> None:
        """A part of length 1 names one position of an axis: that position stays."""
        if any(len(shape) != len(source.shape) for shape in shapes):
            return
        for held, shape in zip(outs, shapes, strict=True):
            for before, after in zip(source.fields, held, strict=True):
                lost = [a for a, n in enumerate(shape) if n == 1 and before.shape[a] > 1 and after.shape[a] == 1]
                if lost:
                    self.labels.lock(after.ravel(), reason)

    def box(self, outs: list[Fields]) -> None:
        for held in outs:
            for array in held:
                if sum(size > 1 for size in array.shape) > 1:
                    self.labels.joint(array.reshape([n for n in array.shape if n > 1]))


def is_pointwise(func: Any, name: str) -> bool:
    """In-place overloads and a few others lack the tag of their functional twin."""
    if name.rstrip("_") in UNTAGGED:
        return True
    twin = getattr(torch.ops.aten, name.rstrip("_"), None) if name.endswith("_") else None
    return twin is not None and any(torch.Tag.pointwise in getattr(twin, o).tags for o in twin.overloads())


class Functions(TorchFunctionMode):
    """Sees what the Python code asks for: gives out sizes that remember, and writes down calls that use them."""

    def __init__(self, recorder: Recorder, calls: list[Call]) -> None:
        super().__init__()
        self.recorder, self.calls = recorder, calls
        self.steps: list[Step] = []
        self.getter = torch.Tensor.shape

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "tensor" and str(kwargs.get("device", "")) == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}  # written-out values stay real
        if name in UNSTEPPED:
            result = func(*args, **kwargs)
        else:
            result = self.stepped(func, name, args, kwargs)
        if name == "__get__":
            if getattr(func, "__self__", None) is self.getter:
                return self.sizes(args[0], result)
            return result
        if name == "size" and args:
            sizes = self.sizes(args[0], args[0].size())
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return sizes if dim is None else sizes[dim]
        if name == "numel":
            return math.prod(self.sizes(args[0], args[0].size()))
        if name in FACTORS:
            Size.floats += [arg.expr for arg in args if type(arg) is Size]
        module = self.recorder.stack[-1] if self.recorder.stack else ""
        own = len(Size.outcomes)
        calls_of(self.calls, self.recorder, name, args, kwargs, result, module)
        del Size.outcomes[own:]  # what was compared here is no branch of the model
        return result

    def stepped(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        known = self.recorder.values
        given = tuple(known.get(id(tensor)) for tensor in tensors((args, kwargs), torch.Tensor))
        self.recorder.step = len(self.steps)
        result = func(*args, **kwargs)
        self.recorder.step = -1
        self.steps.append(Step(name, given, tuple(known.get(id(tensor)) for tensor in tensors(result, torch.Tensor))))
        return result

    def sizes(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        value = self.recorder.values.get(id(tensor))
        if value is None or not value.fields:
            return shape
        moving = {axis for held in value.fields for axis, n in enumerate(held.shape) if n > 1}
        return torch.Size([Size(n, ("dim", value, i)) if i in moving else n for i, n in enumerate(shape)])


@contextmanager
def open_paths() -> Iterator[None]:
    """Keep fused fast paths, and torch's own checks for function modes, out of the run: every call becomes visible."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    spaces = [(m, n, getattr(m, n)) for m in (nn.functional, torch.functional) for n in dir(m) if n.startswith("has_torch_function")]
    for space, name, _ in spaces:
        setattr(space, name, lambda *_: False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for space, name, old in spaces:
            setattr(space, name, old)


@contextmanager
def _valueless() -> Iterator[None]:
    """No gradients, and no fused kernels whose parts could not be seen."""
    fused = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        with torch.no_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.enabled = fused


@contextmanager
def _where(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep ``stack`` at the path of the module that is running."""
    path = {id(module): name for name, module in reversed(list(model.named_modules()))}
    enter = nn.modules.module.register_module_forward_pre_hook(lambda m, _: stack.append(path.get(id(m), "")))
    leave = nn.modules.module.register_module_forward_hook(lambda *_: (stack.pop(), None)[1])
    try:
        yield
    finally:
        enter.remove()
        leave.remove()


def trace(model: nn.Module, example_input: Any, example_kwargs: dict | None = None) -> Graph:
    """Run ``model`` once and return what it computes, with the labels of every tensor.

    Raises :class:`~graphprune.errors.BadInput` when the model does not run on the example.

    >>> len(trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(1, 4)).leaves)
    2
    """
    example = normal_inputs(example_input, example_kwargs)
    try:
        return _run(model, example, real=False)
    except Exception as first:
        try:
            return _run(model, example, real=True)
        except Exception as error:
            raise BadInput(
                f"the model does not run on the example input: {type(error).__name__}: {error}\n"
                "Call model(example_input) yourself; pass a tuple for positional and a dict for keyword arguments."
            ) from (error if str(error) else first)


def _run(model: nn.Module, example: tuple[tuple, dict], real: bool) -> Graph:
    twin, names = shadow(model, real)
    labels, stack, calls = Labels(), [], []
    recorder = Recorder(labels, names, stack, real)
    for name, _, _, tensor in leaf_tensors(twin):
        if id(tensor) not in recorder.values:
            recorder.leaf(tensor, name)
    symbols = plant(twin, recorder.values)
    swap = lambda t: t.detach() if real or not t.is_floating_point() else t.detach().to("meta")  # noqa: E731
    args, kwargs = replace(example[0], swap), replace(example[1], swap)
    inputs = []
    for tensor in tensors((args, kwargs), torch.Tensor):
        value = Value(tuple(tensor.shape), leaf=f"<input {len(inputs)}>")
        recorder.keep(tensor, value)
        inputs.append(value)
    Size.floats, Size.equals, Size.outcomes = [], [], []
    with ExitStack() as scopes:
        functions = Functions(recorder, calls)
        for scope in (open_paths(), _valueless(), _where(twin, stack), recorder, functions):
            scopes.enter_context(scope)
        result = twin(*args, **kwargs)
    outputs = [recorder.value(t) for t in tensors(result, torch.Tensor)]
    reason = labels.reason(Reason("an output of the model keeps its size"))
    for value in outputs:
        for held in value.fields:
            labels.lock(held, reason)
    uses = Size.floats, Size.equals, Size.outcomes
    found = Graph(recorder.nodes, functions.steps, recorder.leaves, labels, inputs, outputs, calls, *uses, symbols, example)
    found.__dict__.update(constants=recorder.constants, real=real)
    return found
