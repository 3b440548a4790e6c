# pyright: strict, reportUnnecessaryIsInstance=false
"""The oracle: :func:`zeroed` runs the original with every removed entry set to zero.

Statistics over a cut axis (a norm, a mean, a softmax) are computed over the survivors. It never looks at the cut model, so the two can be compared.
Recorded calls are replayed on real tensors; where the way through the code depends on values, on seeds or on random numbers, the code itself runs,
and each call that takes statistics is made anew over the survivors before its result is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace as replace_fields
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..arrays import tensor_of
from ..errors import BadInput, BadPlan
from ..operations.notation import Expr, Value, parse
from ..tracing.copies import duplicate
from ..tracing.dice import RUNNING, same_dice
from ..tracing.examples import Examples
from ..tracing.fused import gathered
from ..tracing.graph import Graph
from ..tracing.outputs import Item, items, selected
from ..tracing.run import run
from ..tracing.shadow import modal
from ..tracing.trace import trace
from ..tracing.trees import leaf_tensors, modules_of, replace, tensors
from .masks import parameter_name
from .parts import GONE
from .passthrough import passed
from .plan import Plan

Known = dict[tuple[Any, ...], torch.Tensor]  # positions, by what they were made for

SMALL = 20_000  # entries of a weight up to which few calls matter more than few bytes


def zeroed(model: nn.Module, plan: Plan, graph: Graph | None = None) -> Callable[..., list[torch.Tensor]]:
    """A function of the model's inputs that returns the list of output tensors of the zeroed original."""
    if not isinstance(plan, Plan):
        raise BadPlan(f"the plan is a {type(plan).__name__}; give what graphprune.plan(...) or shrink(..., return_plan=True) returned")

    def run(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return [item for _, item in outcome(model, plan, graph or Examples((args, kwargs)), args, kwargs) if isinstance(item, torch.Tensor)]

    return run


def recorded(graph: Graph, model: nn.Module, plan: Plan) -> Graph:
    """The calls that the zeroed original makes with values: where control flow depends on these, they may take another path."""
    with RUNNING, same_dice(away=True):
        return run(_masked(model, plan), replace_fields(graph.asked, others=()), real=True, amend=_Amended(model, plan) if graph.real else None)


def outcome(model: nn.Module, plan: Plan, known: Graph | Examples, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool = False) -> list[Item]:
    """What the zeroed original returns for these inputs: tensors, arrays and numbers with their paths, of the outputs that matter."""
    graph = known if isinstance(known, Graph) else None
    asked = replace_fields(known.asked if isinstance(known, Graph) else known, example=(args, kwargs), others=())
    given = list(tensors((args, kwargs), torch.Tensor))
    if plan.parts:
        state = graph.state if graph else ()
        return [item for item in _settled(model, plan, asked, training) if item[0].partition(".")[0] not in state]
    if graph is None or [tuple(t.shape) for t in given] != [v.shape for v in graph.inputs]:
        graph = trace(model, args, kwargs, outputs=asked.outputs, apart=asked.apart)
    graph = reading(graph, model, plan)
    asked = replace_fields(asked, apart=graph.asked.apart)
    follows = graph.real or graph.numbers or any(node.op.draws for node in graph.nodes) or any(modal(module) for _, module in modules_of(model))
    if not training and not follows:
        return list(zip(graph.paths, replay(graph, model, plan, given), strict=True))
    return walk(model, plan, asked, training, graph)


def reading(graph: Graph, model: nn.Module, plan: Plan) -> Graph:
    """The run in which a plan cuts what goes together: where copies share an axis with what was copied, it may be the one that keeps them apart."""
    if not graph.labels.repeated or graph.asked.apart or not plan.cuts:
        return graph
    masks = Masks(graph, plan)
    if all(int(masks.axis(graph.leaves[name], axis).sum()) == len(kept) for name, axes in plan.cuts.items() for axis, kept in axes.items()):
        return graph
    return trace(model, *graph.example, outputs=graph.asked.outputs, examples=graph.asked.others, apart=True)


def walk(model: nn.Module, plan: Plan, asked: Examples, training: bool = False, graph: Graph | None = None) -> list[Item]:
    """The zeroed original's own code on the example, with statistics over the survivors; random numbers are drawn for these alone."""
    results: list[Item] = []
    with RUNNING, same_dice():
        run(_masked(model, plan), asked, real=True, amend=_Amended(model, plan, graph), results=results, training=training)
    return results


def answer(model: nn.Module, plan: Plan, asked: Examples) -> list[Item]:
    """What the zeroed original returns for an example that is a function of the model."""
    if plan.parts:
        return _settled(model, plan, asked, training=False)
    try:
        with RUNNING, same_dice():
            graph = run(model, asked, real=False)
    except Exception:  # its way depends on values
        graph = None
    return walk(model, plan, asked, graph=graph)


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        return True
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())  # which takes five times as long; a sum may overflow


class _Amended:
    """Makes each call of a run that takes statistics over a cut axis anew, over what stays of it."""

    def __init__(self, model: nn.Module, plan: Plan, graph: Graph | None = None) -> None:
        self.model, self.plan, self.graph = model, plan, graph
        self.made: _Made | None = None
        self.draws = iter([node for node in graph.nodes if node.op.draws] if graph is not None else [])
        self.masks: Masks | None = None  # of the graph

    def __call__(self, recorder: Any, node: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        self.made = self.made or _Made(recorder, self.model, self.plan)
        whole = self.made.after(node)
        broken = not all(map(_finite, results))
        if node.op.draws:
            self.draw(recorder, node, given, results)
        if not node.reduces and not broken and not whole:
            return
        masks = Masks(recorder, self.plan)
        for (value, better), tensor in zip(whole, results, strict=False):
            tensor.copy_(_filled(better, masks.kept(value), everything=True))
        if node.reduces and not whole and any(masks.kept(value) for value in node.held):  # what is made from whole leaves is right by now
            held = {id(value): tensor for value, tensor in zip(node.held, given, strict=True)}
            for tensor, better in zip(results, _call(node, held, masks, results[0].device), strict=True):
                if tensor.shape == better.shape:  # not the statistics that a norm in training hands back beside its result: they have no labels, and no reader
                    tensor.copy_(better)
        for value, tensor in zip(node.outs, results, strict=True) if broken else ():
            if not _finite(tensor):
                tensor.copy_(_filled(tensor, masks.kept(value)))

    def draw(self, recorder: Any, node: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        """Random numbers anew, where some entries are removed; what they meet later is known from the graph, if that has the same call."""
        masks, known = None, next(self.draws, None)
        if self.graph is not None and known is not None and _same(known, node):
            self.masks = masks = self.masks or Masks(self.graph, self.plan)
            node = known
        masks = masks or Masks(recorder, self.plan)
        if not _drawn(node, masks):
            return
        held = {id(value): tensor for value, tensor in zip(node.held, given, strict=True)}
        torch.set_rng_state(recorder.dice)
        for tensor, better in zip(results, _call(node, held, masks, results[0].device), strict=True):
            tensor.copy_(better)
        recorder.rest = torch.get_rng_state()


def _settled(model: nn.Module, plan: Plan, asked: Examples, training: bool) -> list[Item]:
    """What changes no shape on the way is done to a twin: zeroed weights, and hooks that skip modules; cut axes are then as ever."""
    made_of = {name for gain in plan.gains for name in gain.leaves()}  # these are read whole, and what they make is cut
    twin = _masked(model, replace_fields(plan, cuts={name: axes for name, axes in plan.cuts.items() if name not in made_of})).train(training)
    for part in plan.parts:
        if part.kind == "skip":
            hook: Callable[[nn.Module, Any, Any, Any], Any] = lambda _, a, k, out, part=part: passed(part, a, k, out)  # noqa: E731
            twin.get_submodule(part.name).register_forward_hook(hook, with_kwargs=True)
    taps = {part.name for part in plan.parts if part.kind == "kernel"}
    left = {name: {axis: kept for axis, kept in axes.items() if axis < 2 or name not in taps} for name, axes in plan.cuts.items()}
    left = {name: axes for name, axes in left.items() if axes}
    if left:
        rest = Plan(left, plan.shapes, gains=plan.gains)
        return walk(twin, rest, asked, training) if callable(asked.example) else outcome(twin, rest, asked, *asked.example, training=training)
    with torch.no_grad():
        _, call = next(asked.called(twin, lambda tensor: tensor.detach().clone()))
        return [(path, item.clone() if isinstance(item, torch.Tensor) else item) for path, item in selected(items(call()), asked.outputs)]


def _masked(model: nn.Module, plan: Plan) -> nn.Module:
    memo: dict[int, torch.Tensor] = {}
    gone: Known = {}
    known = {*plan.cuts, *(part.name for part in plan.parts)}
    for leaf, _, _, tensor in leaf_tensors(model):
        name = leaf if leaf in known else parameter_name(leaf)
        data = tensor.detach()
        # What numbers positions goes on doing so: nobody asks for those that are gone.
        counts = name in plan.numbers or not (data.is_floating_point() or data.is_complex() or data.dtype is torch.bool)
        data = without(data, plan, name, gone) if name in known and not counts else data.clone()
        memo.setdefault(id(tensor), nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data)
    return gathered(duplicate(model, memo))


def without(data: torch.Tensor, plan: Plan, name: str, known: Known | None = None) -> torch.Tensor:
    """A copy of a tensor of the model with zeros where the plan removes entries; ``known`` remembers positions that tensors share."""
    if any(part.name == name and part.kind not in GONE for part in plan.parts):
        return data.masked_fill(~plan.mask(name, tuple(data.shape)).to(data.device), 0)
    known = {} if known is None else known
    axes = {axis: positions(kept, data, known) for axis, kept in plan.cuts.get(name, {}).items()}
    if not axes:
        return data.clone()
    if data.ndim == 1:
        return data.masked_fill(_removed(axes[0], data, known), 0)
    kernel = data.shape[2:].numel()
    if kernel > 1 and data.numel() > SMALL and data.is_contiguous() and list(axes) == [0, 1]:  # the entries behind both are copied in one piece each
        at = (axes[0][:, None] * data.shape[1] + axes[1]).view(-1)
        zeros = torch.zeros_like(data)
        zeros.view(-1, kernel).index_copy_(0, at, torch.embedding(data.view(-1, kernel), at))
        return zeros
    result = data
    for axis, kept in axes.items():
        if axis:
            result = torch.where(_removed(kept, data, known, axis), data.new_zeros(()), result)
    return (result.clone() if result is data else result).index_fill_(0, _gone(axes[0], data, known), 0) if 0 in axes else result


def entries(data: torch.Tensor, cuts: dict[int, list[int]], known: Known) -> torch.Tensor:
    """What a plan leaves of a tensor; the entries behind the first two axes are copied in one piece each."""
    axes = {axis: positions(kept, data, known) for axis, kept in sorted(cuts.items())}
    kernel = data.shape[2:].numel()
    if kernel > 1 and data.is_contiguous() and list(axes) == [0, 1]:
        at = (axes[0][:, None] * data.shape[1] + axes[1]).view(-1)
        return torch.embedding(data.view(-1, kernel), at).view(len(axes[0]), len(axes[1]), *data.shape[2:])
    for axis, kept in axes.items():
        data = data.index_select(axis, kept)
    return data


def positions(kept: list[int], data: torch.Tensor, known: Known) -> torch.Tensor:
    key = id(kept), data.device
    if key not in known:
        known[key] = tensor_of(np.array(kept, dtype=np.int64)).to(data.device)
    return known[key]


def _removed(kept: torch.Tensor, data: torch.Tensor, known: Known, axis: int = 0) -> torch.Tensor:
    """A mask that broadcasts to the data, true for the positions of an axis that go."""
    key = id(kept), data.shape[axis], "removed"
    if key not in known:
        known[key] = torch.ones(data.shape[axis], dtype=torch.bool, device=data.device).index_fill_(0, kept, False)
    return known[key] if data.ndim == 1 else known[key].view([-1 if other == axis else 1 for other in range(data.ndim)])


def _gone(kept: torch.Tensor, data: torch.Tensor, known: Known) -> torch.Tensor:
    """The positions of the first axis that go."""
    key = id(kept), data.shape[0], "gone"
    if key not in known:
        known[key] = torch.ones(data.shape[0], dtype=torch.bool, device=data.device).index_fill_(0, kept, False).nonzero().view(-1)
    return known[key]


class Masks:
    """The surviving positions along every axis of every value, from the plan's cuts of the leaves.

    It asks nothing of how groups were settled: a cut position takes the labels joined to it, and a slice (a head, a convolution group) goes with the
    last of its entries.
    """

    def __init__(self, graph: Any, plan: Plan) -> None:
        root = graph.labels.partition().parent
        gone = np.zeros(len(root), dtype=bool)
        for name, axes in plan.cuts.items():
            if name not in graph.leaves and "[" in name:  # a cache may be empty
                continue
            for axis, kept in axes.items():
                field = next(f for f in graph.leaves[name].fields if f.shape[axis] > 1)
                removed = np.ones(field.size, dtype=bool)
                removed[kept] = False
                gone[root[field.ravel()[removed]]] = True
        slices = [(root[joint.rows()], root[joint.slices.ravel()]) for joint in graph.labels.joints if joint.slices is not None]
        before = -1
        while before != (before := int(gone.sum())):
            stays = _still_there(graph, root, gone, slices) if graph.labels.apart else np.zeros(len(root), dtype=bool)
            for rows, names in slices:
                gone[names[gone[rows].all(axis=1) & ~stays[names]]] = True
                gone[rows[gone[names]]] = True
        self.stays, self.apart = ~gone[root], graph.labels.apart
        self.known: dict[tuple[int, ...], tuple[np.ndarray, torch.Tensor] | None] = {}  # by axis and the ids of fields
        self.axes: dict[tuple[int, ...], dict[int, torch.Tensor]] = {}  # by the ids of fields
        self.alive: list[Sequence[np.ndarray]] = []  # the fields, so that ids stay theirs

    def axis(self, value: Value, dim: int) -> np.ndarray:
        """Which positions along one axis survive."""
        stays = self.along(value, dim)
        return np.ones(value.shape[dim], dtype=bool) if stays is None else stays[0]

    def kept(self, value: Value) -> dict[int, torch.Tensor]:
        """The surviving positions of the axes that lose some."""
        if not value.fields:
            return {}
        key = tuple(map(id, value.fields))
        if key not in self.axes:
            along = [self.along(value, dim) for dim in range(len(value.shape))]
            self.axes[key] = {dim: stays[1] for dim, stays in enumerate(along) if stays is not None}
            self.alive.append(value.fields)
        return self.axes[key]

    def along(self, value: Value, dim: int) -> tuple[np.ndarray, torch.Tensor] | None:
        """Which positions of an axis survive, as a mask and as numbers, or None where all do; most values share their fields with others."""
        fields = [field for field in value.fields if field.shape[dim] > 1]
        if not fields:
            return None
        key = (dim, *map(id, fields))
        if key not in self.known:
            mask = self.over(fields[0], dim)
            for field in fields[1:]:
                mask = mask & self.over(field, dim)
            self.known[key] = None if mask.all() else (mask, tensor_of(np.flatnonzero(mask)))
            self.alive.append(fields)
        return self.known[key]

    def over(self, field: np.ndarray, dim: int) -> np.ndarray:
        """Which positions along an axis of a field have a label that stays."""
        if field.size == field.shape[dim]:
            return self.stays[np.reshape(field, -1)]
        return np.asarray(self.stays[field].any(axis=tuple(axis for axis in range(field.ndim) if axis != dim)))


def _still_there(graph: Any, root: np.ndarray, gone: np.ndarray, slices: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The names of slices of which a leaf still has one: the same query of every group has one name, and goes from one group before it goes from all."""
    held, stays = (np.zeros(len(root), dtype=bool) for _ in range(2))
    for leaf in graph.leaves.values():
        for field in leaf.fields:
            held[root[field.ravel()]] = True
    for rows, names in slices:
        stays[names[held[rows].all(axis=1) & ~gone[rows].all(axis=1)]] = True
    return stays


def replay(graph: Graph, model: nn.Module, plan: Plan, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run the recorded calls on the zeroed leaves."""
    calls = replayed(graph, model, plan, inputs)
    with torch.no_grad():
        while True:
            try:
                next(calls)
            except StopIteration as end:
                return end.value


def replayed(
    graph: Graph, model: nn.Module, plan: Plan, inputs: list[torch.Tensor], dice: list[list[torch.Tensor]] | None = None
) -> Generator[list[torch.Tensor], None, list[torch.Tensor]]:
    """The results of the recorded calls on the zeroed leaves, call by call, and in the end the outputs; to be run without gradients.

    ``dice``: what the cut model has drawn at random, which is taken from there (the last) instead of being drawn.
    """
    masks = Masks(graph, plan)
    held: dict[int, torch.Tensor] = {}
    leaves = _Leaves(graph, model, plan, held)
    for name, tensor in graph.constants.items():
        held[id(graph.leaves[name])] = tensor.clone()
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        held[id(value)] = tensor.detach().clone()
    last = {id(value): index for index, node in enumerate(graph.nodes) for value in node.held}
    wanted = {id(value) for value in graph.outputs}
    filled = graph.filled
    made = _Made(graph, model, plan)
    for index, node in enumerate(graph.nodes):
        for value in node.held:
            leaves.ready(value)
        results = among_all(node, dice.pop(), masks) if dice and node.op.draws else _call(node, held, masks, leaves.device)
        for value, tensor in zip(node.outs, results, strict=True):
            tensor = filled[id(value)].clone() if id(value) in filled else tensor
            kept = masks.kept(value)
            held[id(value)] = _filled(tensor, kept) if kept and not _finite(tensor) else tensor
        for value, tensor in made.after(node):
            held[id(value)] = _filled(tensor, masks.kept(value), everything=True)
        yield [held[id(value)] for value in node.outs]
        for value in node.held:
            if last[id(value)] == index and id(value) not in wanted:
                held.pop(id(value), None)
    for value in graph.outputs:
        leaves.ready(value)
    if any(id(value) not in held for value in graph.outputs):
        raise BadInput("an output of the model does not come from the recorded run")
    return [held[id(value)] for value in graph.outputs]


class _Leaves:
    """The model's leaves, each zeroed when the first call reads it."""

    def __init__(self, graph: Graph, model: nn.Module, plan: Plan, held: dict[int, torch.Tensor]) -> None:
        self.plan, self.held = plan, held  # by the id of a value
        self.known: Known = {}
        self.waiting: dict[int, tuple[torch.Tensor, str]] = {}  # leaves that no call has read yet, by the id of their value
        self.same: dict[int, list[int]] = {}  # the values of tied tensors
        for name, _, _, tensor in leaf_tensors(model):
            leaf = graph.leaves.get(name)
            if leaf is not None:
                self.same.setdefault(id(tensor), []).append(id(leaf))
                self.waiting[id(leaf)] = tensor, name
        self.device = next((tensor.device for tensor, _ in self.waiting.values()), torch.device("cpu"))

    def ready(self, value: Value) -> None:
        if id(value) in self.waiting:
            tensor, name = self.waiting[id(value)]
            made = without(tensor.detach(), self.plan, name, self.known)
            for key in self.same[id(tensor)]:
                self.held[key] = made
                self.waiting.pop(key, None)


class _Made:
    """Weights whose norm the plan keeps: they are made from whole leaves, and only then are entries removed."""

    def __init__(self, graph: Graph, model: nn.Module, plan: Plan) -> None:
        self.held: dict[int, torch.Tensor] = {}
        self.touched: set[int] = set()
        if plan.gains:
            names = {gain.name for gain in plan.gains}
            for name, _, _, tensor in leaf_tensors(model):
                if name in graph.leaves:
                    self.held[id(graph.leaves[name])] = tensor.detach()
                    self.touched |= {id(graph.leaves[name])} if name in names else set()

    def after(self, node: Any) -> list[tuple[Value, torch.Tensor]]:
        """The results of a call on whole leaves alone, where one of them is such a weight's."""
        if not self.touched or not node.held or any(id(value) not in self.held for value in node.held):
            return []
        swap: Callable[[Any], torch.Tensor] = lambda value: self.held[id(value)]  # noqa: E731
        results = list(zip(node.outs, _executed(node, replace(node.args, swap), replace(node.kwargs, swap)), strict=True))
        self.held.update((id(value), tensor) for value, tensor in results)
        if not any(id(value) in self.touched for value in node.held):
            return []
        self.touched.update(id(value) for value, _ in results)
        return results


def _call(node: Any, held: dict[int, torch.Tensor], masks: Masks, device: torch.device) -> list[torch.Tensor]:
    kwargs = dict(node.kwargs)
    if "device" in kwargs:
        kwargs["device"] = device
    # A sum of zeros is one; where copies are apart, the names of heads in a result do not tell which of its groups a head was in.
    drawn = _drawn(node, masks)
    plain = not drawn and (not node.reduces or (masks.apart and bool(node.products)))
    cuts = {} if plain else {id(v): masks.kept(v) for v in tensors((node.args, kwargs))}
    if not drawn and not any(cuts.values()):
        swap: Callable[[Any], torch.Tensor] = lambda v: held[id(v)]  # noqa: E731
        return _executed(node, replace(node.args, swap), replace(kwargs, swap))

    def take(value: Value) -> torch.Tensor:
        tensor = held[id(value)]
        order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim)) if drawn else []  # random numbers come in the order of memory
        for dim, kept in cuts[id(value)].items():
            tensor = tensor.index_select(dim, kept.to(tensor.device))
        return tensor.permute(order).contiguous().permute(np.argsort(order).tolist()) if order else tensor

    args = node.refitted(replace(node.args, take), survivors(node.rule, cuts))
    if drawn:  # sizes among the arguments are those of the result
        shape, stays = node.outs[0].shape, masks.kept(node.outs[0])
        short = [len(stays[dim]) if dim in stays else size for dim, size in enumerate(shape)]
        args = tuple([short if _is_shape(arg, shape) else arg for arg in args])
    small = list(tensors(node.func(*args, **replace(kwargs, take)), torch.Tensor))
    return among_all(node, small, masks)


def _is_shape(arg: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(arg, list | tuple) and tuple(cast("Sequence[Any]", arg)) == shape


def _drawn(node: Any, masks: Masks) -> bool:
    """Whether random numbers are drawn for entries of which some are removed: those that stay get the numbers that a shorter tensor gets."""
    return node.op.draws and node.kwargs.get("generator") is None and any(masks.kept(value) for value in node.outs)


def _same(one: Any, other: Any) -> bool:
    """Whether two runs made the same call here."""
    return (
        one.func is other.func
        and one.where == other.where
        and [value.shape for value in one.outs] == [value.shape for value in other.outs]
        and len(one.held) == len(other.held)
    )


def _executed(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The results of a recorded call on real tensors, which may lie in memory in another order than the recorded ones."""
    try:
        return list(tensors(node.func(*args, **kwargs), torch.Tensor))
    except RuntimeError:
        if node.func is not torch.ops.aten.view.default:
            raise
        return [args[0].reshape(args[1])]


def _filled(tensor: torch.Tensor, kept: dict[int, torch.Tensor], everything: bool = False) -> torch.Tensor:
    """Removed entries stay zero where the call makes 0 / 0 of them (``everything``: whatever it makes of them)."""
    for dim, positions in kept.items():
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
        gone[positions] = False
        gone = gone.reshape([-1 if axis == dim else 1 for axis in range(tensor.ndim)]).to(tensor.device)
        tensor = tensor.masked_fill(gone if everything else gone & ~tensor.isfinite(), 0)
    return tensor


def survivors(rule: Expr | None, cuts: dict[int, dict[int, torch.Tensor]]) -> dict[str, int]:
    """How many of the equal blocks that a rule takes an axis apart into (groups of a convolution) have survivors."""
    found: dict[str, int] = {}
    if rule is None or not rule.sizes:
        return found
    for value, axes in zip(rule.operands, parse(rule.text)[0], strict=True):
        for dim, group in enumerate(axes) if isinstance(value, Value) else ():
            name = group[0] if group else ""
            if name in rule.sizes and name not in found:
                stays = torch.zeros(value.shape[dim], dtype=torch.bool)
                stays[cuts[id(value)].get(dim, slice(None))] = True
                found[name] = int(stays.reshape(rule.sizes[name], -1).any(dim=1).sum())
    return found


def among_all(node: Any, small: list[torch.Tensor], masks: Masks) -> list[torch.Tensor]:
    """The results of a call on what stays, among zeros for what is gone."""
    if node.op.chooses_from is not None:  # what is gone is never chosen; positions are those of the original
        small = [_renumbered(tensor, value, masks) for tensor, value in zip(small, node.outs, strict=True)]
    return [_spread(tensor, value, masks.kept(value)) for tensor, value in zip(small, node.outs, strict=True)]


def _renumbered(tensor: torch.Tensor, value: Value, masks: Masks) -> torch.Tensor:
    """Positions among the survivors as positions of the original."""
    if value.numbers is None:
        return tensor
    kept = tensor_of(np.flatnonzero(masks.stays[value.numbers.labels]))
    return kept.to(tensor.device)[tensor]


def _spread(tensor: torch.Tensor, value: Value, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    for dim, positions in kept.items():
        shape = list(tensor.shape)
        shape[dim] = value.shape[dim]
        tensor = tensor.new_zeros(shape).index_copy(dim, positions.to(tensor.device), tensor)
    return tensor
