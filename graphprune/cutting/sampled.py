"""The check on a small sample: the zeroed original and the cut model run on fewer samples and smaller pictures than the example's.

Weights are the same for every sample, pixel and token, so that a fault in them shows on a few as on many. What a sample says counts only where both models
make the calls that were recorded on the example itself, one by one: then nothing but lengths that no cut changes is different. Where they part, or where
the results do, nothing is said, and the example itself is compared (:mod:`~graphprune.cutting.verify`).

The zeroed original runs its own code; a weight's removed entries become zero when a call reads it, and calls that take statistics over a cut axis are
made on what stays of it. The weights themselves are shared with the user's model: a call that would write into them ends the run.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..operations import Operation, resolve
from ..tracing.bodies import Bodies
from ..tracing.copies import duplicate
from ..tracing.dice import same_dice
from ..tracing.functions import DIRECT, FUSED
from ..tracing.fused import gathered, recurrent
from ..tracing.graph import Graph
from ..tracing.node import Node
from ..tracing.record import RESTRIDED, leaves_as_is
from ..tracing.recurrent import RECURRENT
from ..tracing.shadow import evaluating, modal
from ..tracing.surroundings import apart
from ..tracing.trees import is_parameter, leaf_tensors, modules_of, replace, tensors
from .plan import Plan
from .zeroed import Masks, among_all, entries, positions, survivors, without

MOST = 200_000_000  # numbers of a model of which a copy in float64 is made
LONG, SHORT, STEP = 128, 64, 32  # a length from 128 on becomes 64 and what it has beyond a multiple of 32: networks halve pictures five times
RUNNING = ("running_mean", "running_var")  # a batch norm in training mode writes into them, which its schema does not say
# After these, memory may be written where no call shows it.
LEAVING: frozenset[Any] = frozenset((Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__dlpack__, Tensor.share_memory_))
COPIES = frozenset((torch.ops.aten.clone.default, torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default))
PRODUCTS = frozenset((torch.ops.aten.mm.default, torch.ops.aten.bmm.default))
CONVOLUTION = torch.ops.aten.convolution.default
NUMBER, LIFTED = torch.ops.aten.scalar_tensor.default, torch.ops.aten.lift_fresh.default


class Parted(BaseException):
    """Ends a run that is not the recorded one; the model's code may catch exceptions."""


def smaller(example: tuple) -> tuple:
    """Positional and keyword arguments with two samples at most, and shorter axes of pictures, volumes and rows of tokens.

    >>> tuple(smaller(((torch.zeros(8, 3, 224, 224),), {}))[0][0].shape)
    (2, 3, 64, 64)
    """
    given = tensors(example, torch.Tensor)
    samples = {tensor.shape[0] if tensor.ndim else 0 for tensor in given}
    lengths = {n for tensor in given for n in tensor.shape[2 if tensor.is_floating_point() else 1 :] if tensor.ndim >= (4 if tensor.is_floating_point() else 2)}
    lengths = {n: SHORT + n % STEP for n in lengths if n >= LONG}

    def cropped(tensor: torch.Tensor) -> torch.Tensor:
        if len(samples) == 1 and tensor.shape[0] > 2:
            tensor = tensor.narrow(0, 0, 2)
        first = 2 if tensor.is_floating_point() and tensor.ndim > 2 else 1
        for axis in range(first, tensor.ndim):
            if tensor.shape[axis] in lengths:
                tensor = tensor.narrow(axis, 0, lengths[tensor.shape[axis]])
        return tensor

    return tuple(replace(part, cropped) for part in example) if lengths or (len(samples) == 1 and max(samples) > 2) else example


@dataclass(frozen=True)
class Sampled:
    """A cut model beside the zeroed original, on samples of the example of ``graph``."""

    graph: Graph
    model: nn.Module
    small: nn.Module
    plan: Plan

    @cached_property
    def masks(self) -> Masks:
        return Masks(self.graph, self.plan)

    @cached_property
    def bodies(self) -> Bodies:
        return Bodies()

    def nodes(self, training: bool) -> list[Node]:
        return self.graph.training if training else self.graph.nodes

    def possible(self, training: bool = False) -> bool:
        """Whether calls tell a run from the recorded one: no weights that are made of whole ones, no random numbers, no plain numbers as outputs.

        Nor modules that do something of their own where the mode changes, such as adding an update to their weight: the weights are the user's.
        """
        nodes, plan = self.nodes(training), self.plan
        if not nodes or plan.parts or plan.gains or self.graph.numbers or any(modal(module) for _, module in modules_of(self.model)):
            return False
        return not any(node.op.draws for node in nodes)

    def results(self, sample: tuple, training: bool = False, long: bool = False) -> tuple[Any, Any]:
        """What the cut model and the zeroed original return; raises :class:`Parted` where they do not make the recorded calls.

        ``long``: both in float64, on weights and inputs that are float32; parted, too, where the code goes back to shorter numbers.
        """
        nodes = self.nodes(training)
        with torch.no_grad(), same_dice():
            twin, names, memory = shared(self.model, self.plan, long)
            wanted = _run(twin.train() if training else evaluating(twin), sample, _Zeroed(nodes, names, memory, self.masks, self.plan, long=long), self.bodies)
        with torch.no_grad(), same_dice():
            twin, names, memory = shared(self.small, None, long)
            found = _run(twin.train() if training else evaluating(twin), sample, _Cut(nodes, names, memory, self.masks, long=long), self.bodies)
        return found, wanted

    @cached_property
    def normalises(self) -> bool:
        """Whether training mode takes statistics over samples and places; over the few numbers of a sample they make much of rounding."""
        return any(node.op.norm == "batch" for node in self.graph.training)

    @cached_property
    def fits(self) -> bool:
        """Whether the model is float32 throughout, and small enough for a copy in float64."""
        kept = [tensor for *_, tensor in leaf_tensors(self.model) if tensor.is_floating_point()]
        return all(tensor.dtype is torch.float32 for tensor in kept) and sum(tensor.numel() for tensor in kept) <= MOST


def shared(model: nn.Module, plan: Plan | None = None, long: bool = False) -> tuple[nn.Module, dict[int, str], set[int]]:
    """A twin with the very memory of the model's parameters, these by id, and the addresses of the memory.

    All else that it holds is its own, and zero where a plan removes it. ``long``: all of it in float64.
    """
    memo: dict[int, Any] = {}
    names: dict[int, str] = {}
    memory: set[int] = set()
    gone: dict[tuple, torch.Tensor] = {}
    for name, _, _, tensor in leaf_tensors(model):
        if id(tensor) in memo:
            continue
        if is_parameter(tensor):
            twin = memo[id(tensor)] = nn.Parameter(longer(tensor.detach(), long), tensor.requires_grad)
            names[id(twin)] = name
            memory.add(twin.untyped_storage()._cdata)
        else:
            data = longer(tensor.detach(), long)
            counts = not (data.is_floating_point() or data.is_complex() or data.dtype is torch.bool)
            memo[id(tensor)] = data.clone() if plan is None or counts or name in plan.numbers else without(data, plan, name, gone)
    return gathered(duplicate(model, memo)), names, memory


def longer(tensor: torch.Tensor, long: bool) -> torch.Tensor:
    return tensor.double() if long and tensor.dtype is torch.float32 else tensor


def _run(twin: nn.Module, sample: tuple, mode: _Followed, bodies: Bodies) -> Any:
    args, kwargs = (replace(part, lambda tensor: longer(tensor.detach().clone(), mode.long)) for part in sample)
    with ExitStack() as scopes:
        for scope in (mode, _Functions(bodies)):
            scopes.enter_context(scope)
        result = apart(twin, *args, **kwargs)
    left = [node for node in mode.nodes[mode.at :] if not _looks(node.op)]
    if left:
        raise Parted(f"the end instead of {left[0].func}")
    return result


def _short(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _looks(operation: Operation) -> bool:
    """Whether a call only shows entries in another shape, or copies them as they are."""
    return operation.views or operation.func in COPIES


def _same(node: Node, func: Any, args: tuple) -> bool:
    """Whether a call is a recorded one. Where there are no values, torch makes numbers in another way, and products of one matrix by the batch."""
    if node.op.func is func or (func in PRODUCTS and node.op.func in PRODUCTS):
        return True
    return func is LIFTED and node.op.func is NUMBER and not args[0].ndim and args[0].item() == node.args[0]


class _Functions(TorchFunctionMode):
    """Opens torch's own functions as the recorded run did, and makes the calls that it made for them."""

    def __init__(self, bodies: Bodies) -> None:
        super().__init__()
        self.bodies = bodies

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in LEAVING:
            raise Parted(f"{func} gives memory away")
        body = self.bodies[func]
        if body is None:
            name = getattr(func, "__name__", "")
            if name in FUSED:  # spelled out for this call alone: the model's own code finds torch as it is
                with recurrent() if name in RECURRENT else sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **(kwargs or {}))
            return (DIRECT.get(func) or func)(*args, **(kwargs or {}))
        with self:
            return body(*args, **(kwargs or {}))


class _Followed(TorchDispatchMode):
    """Runs beside recorded calls, and ends where they are others."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, nodes: list[Node], names: dict[int, str], memory: set[int], masks: Masks, long: bool = False) -> None:
        super().__init__()
        self.long = long
        self.nodes, self.names, self.masks, self.at = nodes, names, masks, 0
        self.memory = memory  # addresses of what the user's model holds
        self.places: dict[int, list[tuple[int, str]]] = {}  # the arguments that a call writes into, by the id of its function (these live for ever)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is RESTRIDED and leaves_as_is(*args, **kwargs):
            return func(*args, **kwargs)
        node = self.expected(func, args)
        operation = node.op if node is not None and node.op.func is func else resolve(func)
        if operation.whole and not operation.strict:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if operation.writes or operation.norm == "batch":
            self.guard(func, args, kwargs)
        result = self.made(node, func, args, kwargs)
        results = [result] if isinstance(result, torch.Tensor) else tensors(result, torch.Tensor)
        if not results:
            return result
        if node is None and _looks(operation):
            return result
        if node is None or len(results) != len(node.outs):
            raise Parted(f"{func} instead of {self.nodes[self.at].func if self.at < len(self.nodes) else 'the end'}")
        if self.long and any(map(_short, results)):
            raise Parted(f"{func} gives shorter numbers")
        self.compare(node, results)
        self.at += 1
        return result

    def expected(self, func: Any, args: tuple) -> Node | None:
        """The recorded call that this one is; views and copies may be others, for torch needs them or not by the lengths of axes."""
        for at in range(self.at, len(self.nodes)):
            node = self.nodes[at]
            if _same(node, func, args):
                self.at = at
                return node
            if not _looks(node.op):
                break
        return None

    def guard(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Nothing may be written into memory that belongs to the user's model."""
        places = self.places.get(id(func))
        if places is None:
            names = enumerate(func._schema.arguments)
            places = [(at, item.name) for at, item in names if item.name in RUNNING or (item.alias_info and item.alias_info.is_write)]
            self.places[id(func)] = places
        for tensor in tensors([args[at] if at < len(args) else kwargs.get(name) for at, name in places], torch.Tensor):
            if tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self.memory:
                raise Parted("a write into a parameter")

    def made(self, node: Node | None, func: Any, args: tuple, kwargs: dict) -> Any:
        return func(*args, **kwargs)

    def compare(self, node: Node, results: list[torch.Tensor]) -> None:
        """Look at the results of a call."""


class _Zeroed(_Followed):
    """Makes the calls of the zeroed original."""

    def __init__(self, nodes: list[Node], names: dict[int, str], memory: set[int], masks: Masks, plan: Plan, long: bool = False) -> None:
        super().__init__(nodes, names, memory, masks, long)
        self.plan = plan
        self.gone: dict[tuple, torch.Tensor] = {}
        self.given: list[torch.Tensor] = []

    def made(self, node: Node | None, func: Any, args: tuple, kwargs: dict) -> Any:
        self.given = given = tensors((args, kwargs) if kwargs else args, torch.Tensor)
        if func is CONVOLUTION and node is not None and not node.reduces:
            result = self.convolved(args)
            if result is not None:
                return result
        swaps = {}
        for tensor in given:
            name = self.names.get(id(tensor))
            if name in self.plan.cuts:
                swaps[id(tensor)] = without(tensor, self.plan, name, self.gone)
        if node is not None and node.reduces and not (self.masks.apart and node.products):
            if len(given) != len(node.held):
                raise Parted
            cuts = {id(value): self.masks.kept(value) for value in node.held}
            if any(cuts.values()):
                return self.over_survivors(node, func, args, kwargs, dict(zip(map(id, given), node.held, strict=True)), swaps, cuts)
        if swaps:
            swap = lambda tensor: swaps.get(id(tensor), tensor)  # noqa: E731
            args, kwargs = replace(args, swap), replace(kwargs, swap)
        return func(*args, **kwargs)

    def convolved(self, args: tuple) -> torch.Tensor | None:
        """A convolution whose weight is zero in whole rows and columns, made from the others alone: they are all that adds anything.

        None for one of several groups, for a transposed one, and where the bias keeps entries in rows that are gone.
        """
        x, weight, bias, *rest = args
        cuts = self.plan.cuts.get(self.names.get(id(weight), ""), {})
        spared = {} if bias is None else self.plan.cuts.get(self.names.get(id(bias), "its own"), {})
        if not cuts or max(cuts) > 1 or rest[3] or rest[5] != 1 or (bias is not None and spared.get(0) != cuts.get(0)):
            return None
        rows, columns = (positions(cuts[axis], weight, self.gone) if axis in cuts else None for axis in (0, 1))
        if columns is not None:
            x = x.index_select(1, columns)
        if bias is not None and rows is not None:
            bias = bias.index_select(0, rows)
        result = CONVOLUTION(x, entries(weight, cuts, self.gone), bias, *rest)
        if rows is None:
            return result
        shape = list(result.shape)
        shape[1] = weight.shape[0]
        return result.new_zeros(shape).index_copy(1, rows, result)

    def over_survivors(self, node: Node, func: Any, args: tuple, kwargs: dict, values: dict, swaps: dict, cuts: dict) -> Any:
        """A call that takes statistics, on what stays of its axes."""
        if node.op.inplace:
            raise Parted

        def take(tensor: torch.Tensor) -> torch.Tensor:
            value = values[id(tensor)]
            tensor = swaps.get(id(tensor), tensor)
            for dim, kept in cuts[id(value)].items():
                if tensor.ndim != len(value.shape) or tensor.shape[dim] != value.shape[dim]:
                    raise Parted
                tensor = tensor.index_select(dim, kept.to(tensor.device))
            return tensor

        args = node.refitted(replace(args, take), survivors(node.rule, cuts))
        result = func(*args, **replace(kwargs, take))
        whole = iter(among_all(node, tensors(result, torch.Tensor), self.masks))
        return replace(result, lambda _: next(whole))

    def compare(self, node: Node, results: list[torch.Tensor]) -> None:
        """A sample that is stretched to a fixed size, where the example is not, has equal entries in places that have weights of their own."""
        if len(node.held) != 1 or len(self.given) != 1:
            return
        recorded, now = (node.held[0].shape, node.outs[0].shape), (self.given[0].shape, results[0].shape)
        if len({len(shape) for shape in (*recorded, *now)}) == 1 and not node.op.moves:
            if any(before >= after and given < made for before, after, given, made in zip(*recorded, *now, strict=True)):
                raise Parted(f"{node.func} stretches the sample")


class _Cut(_Followed):
    """Sees that the results of a cut model's calls have the lengths that the plan leaves."""

    def compare(self, node: Node, results: list[torch.Tensor]) -> None:
        for tensor, value in zip(results, node.outs, strict=True) if not _looks(node.op) else ():
            if tensor.ndim == len(value.shape):
                for dim, kept in self.masks.kept(value).items():
                    if tensor.shape[dim] != len(kept):
                        raise Parted(f"a result of {node.func} of shape {tuple(tensor.shape)}")
