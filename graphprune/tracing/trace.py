"""One run of the model, without values, in which labels ride along: :func:`trace` returns the :class:`Graph`.

The run happens on a throw-away copy whose floating parameters lie on the meta device, under a dispatch mode that sees
every ATen operation and a function mode that sees what sizes the Python code asked for. Where control flow depends on
values, the run is repeated with real ones.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import BadInput, BadModel, BadRule, UnknownName, no_module
from ..operations.labels import Labels, Reason
from ..operations.notation import Value
from .bodies import Bodies
from .choices import Choice, settled
from .copies import duplicate
from .features import Marks, marks
from .fused import attention, unfused
from .needs import Call, calls_of, sized, sizes_in
from .node import Node, line
from .outputs import Item, handed_back, items, selected
from .paths import following
from .picks import settle
from .record import CPU, HERE, META, TORCH, Recorder
from .recurrent import RECURRENT, STATEFUL, hand_on
from .sizes import Branch, Doubt, Expr, Size
from .states import stated, states_of, unstated
from .statistics import hold_statistics
from .summary import summary
from .surroundings import undisturbed_surroundings
from .symbols import channels_of_bare_norms, plant
from .trees import inner_modules, is_parameter, leaf_tensors, modules_of, normal_inputs, replace, tensors
from .unused import forget, hold, more_run, reads_mode, same_dice, train_run, unread
from .updates import hold_ranks
from .ways import Way, ways

__all__ = ["Graph", "Node", "Step", "trace"]

OUTPUT = "an output of the model keeps its size"
NOT_RUN = (
    "the model does not run on the example input: {}: {}\nCall model(example_input) yourself; pass a tuple for positional and a dict for keyword arguments."
)

NESTED = "it makes nested tensors, whose entries have no common shape and so no axes; run it on padded ones, or on one sequence at a time"

# What asks a tensor for a property: these calls are no steps of the model.
UNSTEPPED = frozenset("__get__ size dim numel __len__ is_floating_point is_complex stride data_ptr element_size get_device".split())


# Recurrent calls want their first state, that has values here, where the weights lie. A run with values shows what a processor
# does (the gates of all steps at once), but not what they are made of on a GPU: that one has kernels of its own, which nothing sees into.
FUSED = RECURRENT | {"scaled_dot_product_attention", "scaled_dot_product_attention.default"}


class Step(NamedTuple):
    """One call of the Python code: its name, the values of its tensor arguments and of its results, in order, and whether any is floating."""

    name: str
    args: tuple[Value | None, ...]
    results: tuple[Value | None, ...]
    floats: bool = True


@dataclass(frozen=True)
class Graph:
    """What a model computes on an example: the ATen calls in order, its leaves, and the labels of every tensor.

    ``nodes`` are ATen calls, ``steps`` calls of the Python code. ``leaves`` are parameters, buffers, plain tensor attributes (by qualified name) and
    constants made in the code (``"<constant 3>"``). ``calls``, ``floats``, ``equals``, ``outcomes``, ``doubts`` and ``symbols`` say what the code does
    with sizes (:mod:`graphprune.tracing.symbols`). ``example`` holds the positional and the keyword arguments of the run.
    """

    nodes: list[Node]
    steps: list[Step]
    leaves: dict[str, Value]
    labels: Labels
    inputs: list[Value]
    outputs: list[Value]
    calls: list[Call]
    floats: list[Expr]
    equals: list[tuple[Expr, Expr]]
    outcomes: list[Branch]
    doubts: list[Doubt]
    symbols: dict[tuple, int]
    example: tuple[tuple, dict]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)  # by the name of the leaf
    filled: dict[int, torch.Tensor] = field(default_factory=dict)  # whole numbers that no call shows being written, by the id of their value
    real: bool = False  # whether the run had values: control flow depends on them
    parameters: frozenset[str] = frozenset()  # the leaves that are parameters
    unread: list[str] = field(default_factory=list)  # the leaves that no run reads
    picks: dict[str, tuple[Value, int]] = field(default_factory=dict)  # the axis whose positions an integer buffer numbers
    choices: list[Choice] = field(default_factory=list)  # axes that the code chooses from, of which entries may go (experts)
    marks: Marks = field(default_factory=Marks)  # which labels learnt weights make and read
    paths: list[str] = field(default_factory=list)  # of the outputs, in the result
    numbers: bool = False  # whether plain numbers stand beside them there
    asked: Any = None  # what was run: example, outputs that matter, further examples
    state: frozenset[str] = frozenset()  # parts of the result that the model takes back itself in its next call
    states: frozenset[str] = frozenset()  # parts of the result whose width follows what is cut (:mod:`graphprune.tracing.states`)
    looked: list[tuple[str, str]] = field(default_factory=list)  # (module, line) that looked at a value
    trained: bool = False  # whether what training mode does is part of the labels
    training: list[Node] = field(default_factory=list)  # the calls of a run in training mode, where that may be another one
    random_in_training: bool = False  # whether any run drew random numbers

    def __str__(self) -> str:
        return summary(self)

    def __repr__(self) -> str:
        return f"<Graph: {len(self.nodes)} calls, {len(self.leaves)} tensors, {self.labels.count} labels>"

    derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # costs and tables that were made for it; they go with it

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


def shadow(model: nn.Module, real: bool) -> tuple[nn.Module, list[tuple[torch.Tensor, str]]]:
    """A throw-away copy that drops the weights (or copies them), and every tensor in it with its name."""
    memo: dict[int, Any] = {}
    held: list[tuple[torch.Tensor, str]] = []
    for name, _, _, tensor in leaf_tensors(model):
        if id(tensor) in memo:
            continue
        data = tensor.detach()
        if is_parameter(tensor):
            twin = nn.Parameter(data.clone() if real else data.to(META), False)
        else:
            twin = data.clone() if real or not data.is_floating_point() else data.to(META)
        memo[id(tensor)] = twin
        held.append((twin, name))
    return evaluating(duplicate(model, memo)), held


def evaluating(model: nn.Module) -> nn.Module:
    """``model.eval()``, without a call for each module unless one has its own."""
    modules = [module for _, module in modules_of(model)]
    if any(type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval for module in modules):
        return model.eval()
    for module in modules:
        module.__dict__["training"] = False
    return model


def _batch_norm(*args: Any) -> torch.Tensor:
    return torch.native_batch_norm(*args[:8])[0]


RUNNING = threading.RLock()  # random numbers that a run draws are put back, for all threads: one at a time
# What a function does in one call, where torch's way to it makes several.
DIRECT: dict[Any, Callable[..., Any]] = {torch.batch_norm: _batch_norm}
PASS, SHAPE, GET, SIZE, NUMEL, TENSOR, PLAIN, LEAVES, DATA, DEVICE, CALL = range(11)
# Calls by their name: those that give out sizes, those that give plain numbers made of them, those by which values leave torch.
KINDS = {"size": SIZE, "numel": NUMEL, "tensor": TENSOR, "__len__": PLAIN, "stride": PLAIN, "numpy": LEAVES, "tolist": LEAVES, "__array__": LEAVES}
PROPERTIES = {("__get__", torch.Tensor.shape): SHAPE, ("__get__", torch.Tensor.nbytes): PLAIN}
PROPERTIES |= {("__set__", torch.Tensor.data): DATA, ("__get__", torch.Tensor.device): DEVICE, ("__get__", torch.Tensor.is_cpu): DEVICE}
ANSWERS = {torch.Tensor.device: CPU, torch.Tensor.is_cpu: True}  # of a model on the processor


@lru_cache(maxsize=4096)
def kind_of(func: Any) -> tuple[int, str, bool]:
    """What to do about a function (nothing for most), its name, and whether it is a step of the model."""
    name = getattr(func, "__name__", "")
    if name == "__get__" or name == "__set__":
        return PROPERTIES.get((name, getattr(func, "__self__", None)), GET), name, False
    kind = KINDS.get(name, CALL if sized(name) else PASS)
    return kind, name, name not in UNSTEPPED


def floating(held: list[torch.Tensor]) -> bool:
    """Whether a call on these works on activations, not only on positions and masks (which depend on the number of samples in some models)."""
    for tensor in held:
        if tensor.is_floating_point() or tensor.is_complex():
            return True
    return False


def indexed(index: Any) -> Any:
    """Lists of positions as tensors with values; torch itself would make them where the indexed tensor lies, which may hold none."""
    if isinstance(index, tuple):
        return tuple([indexed(part) for part in index])
    return torch.tensor(index, device="cpu") if type(index) is list and index and all(type(entry) in (int, bool) for entry in index) else index


class Functions(TorchFunctionMode):
    """Sees what the Python code asks for: gives out sizes that remember, and writes down calls that use them."""

    def __init__(self, recorder: Recorder, calls: list[Call], away: bool, home: bool = False) -> None:
        super().__init__()
        self.away = away  # the model lies on another device than the processor
        self.home = home  # it lies on the processor
        self.recorder, self.calls = recorder, calls
        self.bodies = Bodies()
        self.steps: list[Step] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        kind, name, step = kind_of(func)
        body = self.bodies[func]
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if kind == TENSOR and str(kwargs.get("device", "")) == "meta":
            kwargs = {**kwargs, "device": torch.device("cpu")}  # written-out values stay real
        since = len(self.recorder.nodes)
        result = self.stepped(func, name, args, kwargs) if step else func(*args, **kwargs)
        return self.returned(kind, func, name, args, kwargs, result, since)

    def returned(self, kind: int, func: Any, name: str, args: tuple, kwargs: dict, result: Any, since: int) -> Any:
        """The result of a call for the code that made it, once the sizes that it was given are noted."""
        if kind == PASS or kind == TENSOR:
            sizes = sizes_in(args, kwargs)
            if sizes:
                self.recorder.uses.floats.extend([size.expr for size in sizes])
            return result
        if kind == CALL:
            calls_of(self.calls, self.recorder, name, args, kwargs, result, self.recorder.stack[-1] if self.recorder.stack else "", since)
            return result
        return result if kind == GET else self.answered(kind, func, name, args, kwargs, result)

    def answered(self, kind: int, func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> Any:
        """What the code is told that asks for a size, a device or values."""
        if kind == DEVICE:
            return ANSWERS[func.__self__] if self.home and args[0].is_meta else result  # code that asks takes the path that it takes with values
        if kind == SHAPE:
            return self.sizes(args[0], result)
        if kind == SIZE and args:
            sizes = self.sizes(args[0], args[0].size())
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return sizes if dim is None else sizes[dim]
        if kind == NUMEL:
            return math.prod(self.sizes(args[0], args[0].size()))
        if kind == PLAIN:
            self.doubted(args[0], 1 if name == "__len__" else args[0].ndim)
        elif kind == LEAVES:
            self.leave(args[0], name)
        elif kind == DATA:
            self.recorder.values[id(args[0])] = self.recorder.value(args[1])
        return result

    def doubted(self, tensor: torch.Tensor, rank: int) -> None:
        """A plain number was made of the first entries of the shape."""
        for size in self.sizes(tensor, tensor.size())[:rank]:
            if type(size) is Size:
                self.recorder.uses.doubt(size.expr)

    def leave(self, tensor: torch.Tensor, name: str) -> None:
        """Values that leave torch: what becomes of them cannot be followed, so what they belong to stays whole."""
        value = self.recorder.value(tensor)
        self.recorder.read.add(id(value))
        module = self.recorder.stack[-1] if self.recorder.stack else ""
        reason = self.recorder.labels.reason(Reason("its values leave torch", name, module, self.recorder.place()))
        for array in value.fields:
            self.recorder.labels.lock(array, reason)

    def stepped(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        known = self.recorder.values
        held = tensors((args, kwargs) if kwargs else args, torch.Tensor)
        given = tuple([known.get(id(tensor)) for tensor in held])
        floats = floating(held)
        self.recorder.step = len(self.steps)
        if name == "__getitem__" or name == "__setitem__":
            args = (args[0], indexed(args[1]), *args[2:])
        if self.away and name in RECURRENT and any(tensor.is_meta for tensor in held):
            args, kwargs = replace((args, kwargs), self.valueless)
        result = self.plainly(func, name, args, kwargs, held)
        self.recorder.step = -1
        made = [result] if isinstance(result, torch.Tensor) else tensors(result, torch.Tensor)
        if name in STATEFUL:
            hand_on(self.recorder, args, made)
        self.steps.append(Step(name, given, tuple([known.get(id(tensor)) for tensor in made]), floats or floating(made)))
        return result

    def plainly(self, func: Callable[..., Any], name: str, args: tuple, kwargs: dict, given: list[torch.Tensor]) -> Any:
        """The call, without kernels that do many operations in one."""
        if name in FUSED and not any(tensor.is_meta for tensor in given):
            if name not in RECURRENT:
                return attention(*args, **kwargs)
            with unfused():
                return func(*args, **kwargs)
        return DIRECT.get(func, func)(*args, **kwargs)

    def valueless(self, tensor: torch.Tensor) -> torch.Tensor:
        """A floating tensor on the meta device, known as what it was."""
        if tensor.is_meta or not tensor.is_floating_point():
            return tensor
        with _disable_current_modes():
            twin = tensor.detach().to(META)
        self.recorder.values[id(twin)] = self.recorder.value(tensor)
        self.recorder.alive.append(twin)
        return twin

    def sizes(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        value = self.recorder.values.get(id(tensor))
        if value is None or not value.fields:
            return shape
        moving = {axis for held in value.fields for axis, n in enumerate(held.shape) if n > 1}
        return torch.Size([Size(n, ("dim", value, i), self.recorder.uses) if i in moving else n for i, n in enumerate(shape)])


def trace(
    model: nn.Module, example_input: Any, example_kwargs: dict | None = None, *, outputs: Any = None, examples: Sequence[Any] = (), apart: bool = False
) -> Graph:
    """Run ``model`` once and return what it computes, with the labels of every tensor.

    ``outputs`` says which parts of the result keep their size (by default all): a name, an index, a predicate ``(path, tensor) -> bool``, or several.
    ``examples`` are further ones that must hold, too: inputs as ``example_input``, or functions ``(model) -> result``.
    ``apart``: where something is repeated along the axis on which it lies (keys for the queries of their group), copies may go instead of what is copied.

    Raises :class:`~graphprune.errors.BadInput` when the model does not run on the example, :class:`~graphprune.errors.BadModel` when it does, but cannot
    be followed there, :class:`~graphprune.errors.UnknownName` when ``outputs`` names nothing.

    >>> len(trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(1, 4)).leaves)
    2
    """
    if not isinstance(model, nn.Module):
        raise BadModel(no_module(model))
    example = normal_inputs(example_input, example_kwargs)
    if isinstance(examples, torch.Tensor | str | Mapping) or not isinstance(examples, Iterable):
        raise BadInput(f"examples is a {type(examples).__name__}; it is a list of further inputs, or of functions (model) -> result")
    if isinstance(outputs, bool) or (isinstance(outputs, Sized) and not len(outputs)):
        raise BadInput(f"outputs is {outputs!r}; it is a name, an index, a function (path, tensor) -> bool, or several of these (None: all)")
    others = tuple(each if callable(each) else normal_inputs(each, example_kwargs) for each in examples)
    with RUNNING, same_dice():
        return _traced(model, Examples(example, outputs, others, apart))


@dataclass(frozen=True)
class Examples:
    """What is run: an example (positional and keyword arguments), which outputs matter, and further examples."""

    example: tuple[tuple, dict]
    outputs: Any = None
    others: tuple[Any, ...] = ()
    apart: bool = False

    def called(self, model: nn.Module, swap: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[list[torch.Tensor], Callable[[], Any]]]:
        """For every example its tensors, and the call; what the model writes into its inputs is written into copies."""
        for example in (self.example, *self.others):
            if isinstance(example, Way):
                args, kwargs = replace(example.args, swap), replace(example.kwargs, swap)
                yield tensors((args, kwargs), torch.Tensor), lambda way=example, args=args, kwargs=kwargs: way.run(model, args, kwargs)
            elif callable(example):
                yield [], lambda example=example: example(model)
            else:
                args, kwargs = replace(example[0], swap), replace(example[1], swap)
                yield tensors((args, kwargs), torch.Tensor), lambda args=args, kwargs=kwargs: model(*args, **kwargs)


def _traced(model: nn.Module, asked: Examples) -> Graph:
    try:
        graph = run(model, asked, real=False)
        stale = any("[" in name for name in graph.unread)  # a cache that the run looked for under another device
        return run(model, asked, real=True) if stale else _other_ways(model, graph, asked)
    except (BadRule, BadModel, UnknownName):
        raise
    except Exception as first:
        try:
            return run(model, asked, real=True)
        except UnknownName:
            raise
        except Exception as error:
            fails(model, asked.example)
            where = f" ({line(at)})" if (at := raised_at(error)) else ""
            why = NESTED if "NestedTensor" in str(error) else f"{type(error).__name__}: {error}"
            text = f"the model runs on the example, but its run cannot be followed{where}: {why}"
            raise (error if isinstance(error, BadInput) else BadModel(text)) from (error if str(error) else first)


def _other_ways(model: nn.Module, graph: Graph, asked: Examples) -> Graph:
    """The graph, made again where the model has further ways that read sizes which this run did not."""
    further = ways(model, graph, lambda: shadow(model, real=False)[0], lambda t: t.detach().clone() if not t.is_floating_point() else t.detach().to(META))
    if not further:
        return graph
    try:
        return run(model, replace_fields(asked, others=(*asked.others, *further)), real=False)
    except Exception:  # a way that cannot be followed asks for nothing
        return graph


def fails(model: nn.Module, example: Any, training: bool = False) -> None:
    """Raises :class:`~graphprune.errors.BadInput` if the model itself fails on an example, run by nobody but torch."""
    try:
        with torch.no_grad(), same_dice(), undisturbed_surroundings(model):
            twin = shadow(model, real=True)[0]
            twin = twin.train() if training else twin
            if callable(example):
                example(twin)
            else:
                args, kwargs = (replace(part, lambda tensor: tensor.detach().clone()) for part in example)
                twin(*args, **kwargs)
    except Exception as error:
        odd = _odd(example)
        said = str(error).partition("\n")[0] if odd else error
        inner = inner_modules(model) if isinstance(error, NotImplementedError) else ""
        hint = f" {type(model).__name__} has no forward of its own{inner}" if inner else odd
        raise BadInput(NOT_RUN.format(type(error).__name__, said) + hint) from error


def _odd(example: Any) -> str:
    """What an example that the model refuses looks like, where that says how to mend it: a shape, arrays of numpy, a list."""
    if callable(example):
        return ""
    args, kwargs = example
    values = [*args, *kwargs.values()]
    shape = args[0] if len(args) == 1 and isinstance(args[0], Sequence | torch.Size) else args
    if shape and not isinstance(shape, str) and all(type(each) is int for each in shape):
        return f"\nThe example looks like a shape; give a tensor: torch.randn({', '.join(map(str, shape))})."
    foreign = next((each for each in values if hasattr(each, "__array__") and not isinstance(each, torch.Tensor)), None)
    if foreign is not None:
        return f"\nThe example holds a {type(foreign).__module__}.{type(foreign).__name__}; give a tensor: torch.as_tensor(...)."
    if len(args) == 1 and isinstance(args[0], list) and tensors(args[0], torch.Tensor):
        return "\nThe example is a list, which is one argument; a tuple is several: tuple(example_input), and one tensor alone is given as it is."
    return ""


def raised_at(error: BaseException) -> tuple[str, int] | None:
    """The innermost place in the user's code at which an error was raised."""
    place, frames = None, error.__traceback__
    while frames:
        file = frames.tb_frame.f_code.co_filename
        if not file.startswith((HERE, TORCH)) and file[:1] not in ("", "<"):
            place = file, frames.tb_lineno
        frames = frames.tb_next
    return place


def _kernels(modules: list[tuple[str, nn.Module]]) -> Iterator[int]:
    """The ids of the kernels of convolutions: their taps stay, whatever a weight is made of on the way (a norm of the flattened kernel)."""
    for _, module in modules:
        if isinstance(module, nn.modules.conv._ConvNd):
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.ndim == 2 + len(module.kernel_size) and tuple(tensor.shape[2:]) == tuple(module.kernel_size):
                    yield id(tensor)


@dataclass
class _Runs:
    """What the runs of one trace leave beside what their recorder holds."""

    inputs: list[Value]
    chosen: list[Item]  # what counts of what the first run returned
    outputs: list[Value]
    state: frozenset[str]  # the paths of results that are the model's own state, handed back
    states: frozenset[str]  # parts of the result whose width follows what is cut
    steps: list  # the functions that the first run called
    all_steps: list  # those of the others too
    calls: list
    others: list[Value]  # what further examples, and the run in training mode, returned
    trained: bool  # whether there was a run in training mode
    training: list[Node]


def run(model: nn.Module, asked: Examples, real: bool, amend: Any = None, results: list[Item] | None = None, training: bool = False) -> Graph:
    """One run, as a graph. ``amend`` is called with every call and its results with values; ``results`` receives what the model returned."""
    twin, leaves = shadow(model, real)
    if training:
        twin.train()
    parameters = frozenset([name for tensor, name in leaves if is_parameter(tensor)])
    labels = Labels(apart=asked.apart)
    recorder = Recorder(labels, {id(tensor): name for tensor, name in leaves}, [], real)
    recorder.amend = amend
    modules = modules_of(twin)
    kernels = set(_kernels(modules))
    for tensor, name in leaves:
        recorder.leaf(tensor, name, 2 if id(tensor) in kernels else tensor.ndim)
    symbols = recorder.symbols = plant(modules, recorder.values, model, recorder.uses)
    runs = _recorded(recorder, model, twin, modules, asked, parameters, results)
    calls = [*runs.calls, *channels_of_bare_norms(recorder.nodes, symbols)]
    forget(recorder, runs.outputs)
    numbered = settle(labels, recorder.picks, recorder.nodes + recorder.extra, recorder.leaves)
    idle = unread(recorder, recorder.nodes + recorder.extra)
    hold(recorder, idle)
    choices, of_choice = settled(labels, recorder.choices)
    hold_statistics(labels, recorder.nodes + recorder.extra, of_choice)
    hold_ranks(labels, recorder.nodes + recorder.extra, [value for name, value in recorder.leaves.items() if name in parameters])
    reason = labels.reason(Reason(OUTPUT))
    sizes = stated(model, symbols)
    tops = [path.partition(".")[0] for path, item in runs.chosen if isinstance(item, torch.Tensor)]
    for name, value in [*zip(tops, runs.outputs, strict=True), *(("", value) for value in runs.others)]:
        for entries in unstated(value, sizes) if name in runs.states else value.fields:
            labels.lock(entries, reason)
    uses = recorder.uses
    paths = [path for path, item in runs.chosen if isinstance(item, torch.Tensor)]
    learnt = parameters if parameters.intersection(recorder.leaves) else frozenset(recorder.leaves)
    return Graph(
        nodes=recorder.nodes,
        steps=runs.steps,
        leaves=recorder.leaves,
        labels=labels,
        inputs=runs.inputs,
        outputs=runs.outputs,
        calls=calls,
        floats=uses.floats,
        equals=uses.equals,
        outcomes=uses.outcomes,
        doubts=uses.doubts,
        symbols=symbols,
        example=asked.example,
        constants=recorder.constants,
        filled=recorder.filled,
        real=real,
        parameters=parameters,
        unread=idle,
        picks=numbered,
        choices=choices,
        marks=marks(recorder.nodes + recorder.extra, runs.all_steps, recorder.leaves, learnt).with_made(labels.copied),
        paths=paths,
        numbers=len(runs.chosen) > len(paths),
        asked=asked,
        state=runs.state,
        states=runs.states,
        looked=list(dict.fromkeys(recorder.looked)),
        trained=runs.trained and not recorder.stopped,
        training=runs.training,
        random_in_training=any(torch.Tag.nondeterministic_seeded in node.func.tags for node in (*recorder.nodes, *recorder.extra)),
    )


def _recorded(
    recorder: Recorder,
    model: nn.Module,
    twin: nn.Module,
    modules: list[tuple[str, nn.Module]],
    asked: Examples,
    parameters: frozenset[str],
    results: list[Item] | None,
) -> _Runs:
    """Run the twin of a model on every example, and in training mode where that matters, with the recorder watching."""
    home = {tensor.device for *_, tensor in leaf_tensors(model)}
    swap = lambda t: t.detach().clone() if recorder.real or not t.is_floating_point() else t.detach().to(META)  # noqa: E731
    first, *more = asked.called(twin, swap)
    inputs, call = entered(recorder, first[0]), first[1]
    calls: list = []
    with ExitStack() as scopes:
        scopes.callback(recorder.release)
        scopes.callback(recorder.uses.forgotten)
        away = any(device.type not in ("cpu", "meta") for device in home)  # what is on the meta device is taken for what it is with values, on the processor
        functions = Functions(recorder, calls, away, not away)
        for scope in (torch.no_grad(), undisturbed_surroundings(model), following(modules, recorder.stack), recorder, functions):
            scopes.enter_context(scope)
        result = call()
        state, states, chosen = _results(recorder, model, result, asked)
        outputs = [recorder.value(item) for _, item in chosen if isinstance(item, torch.Tensor)]
        if results is not None:
            results += [(path, item.clone() if isinstance(item, torch.Tensor) else item) for path, item in chosen]
        steps, others, training = list(functions.steps), [], []
        recorder.amend = None
        for tensors_of, other in more:
            entered(recorder, tensors_of)
            others += more_run(recorder, other, asked.outputs, state | states)
        trained = reads_mode(modules) or bool(parameters.intersection(unread(recorder, recorder.nodes + recorder.extra)))
        if trained:
            twin.train()
            with _disable_current_modes():
                again, call = next(asked.called(twin, swap))
            entered(recorder, again)
            before = len(recorder.extra)
            others += train_run(recorder, call, asked.outputs, state | states)
            training = [] if recorder.stopped else recorder.extra[before:]
    return _Runs(inputs, chosen, outputs, state, states, steps, functions.steps, calls, others, trained, training)


def _results(recorder: Recorder, model: nn.Module, result: Any, asked: Examples) -> tuple[frozenset[str], frozenset[str], list[Item]]:
    """The paths of the model's own state in what it returned, those of states that follow its configuration, and what counts as an output."""
    state = frozenset() if callable(asked.example) else handed_back(model, result, *asked.example)
    chosen = selected([item for item in items(result) if item[0].partition(".")[0] not in state], asked.outputs)
    recorder.uses.floats.extend([number.expr for _, number in chosen if type(number) is Size])
    if asked.outputs is not None or callable(asked.example):
        return state, frozenset(), chosen
    outputs = [recorder.value(item) for _, item in chosen if isinstance(item, torch.Tensor)]
    return state, states_of(model, result, chosen, outputs, recorder.nodes, asked.example), chosen


def entered(recorder: Recorder, inputs: list[torch.Tensor]) -> list[Value]:
    """The values of the tensors that a model is given."""
    values = []
    for tensor in inputs:
        value = Value(tuple(tensor.shape), leaf=f"<input {len(values)}>")
        recorder.keep(tensor, value)
        values.append(value)
    return values
