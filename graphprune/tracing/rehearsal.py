"""Whether a cut model's own code does what was promised: :func:`rehearse` runs it without values and compares call by call with the run on the whole model.

Each call has to be the recorded one, on the same tensors, with the same numbers, and its results have to have the lengths that the cut leaves. Numbers
that say a shape may change (the shape shows them), and so may positions, if they name the same entries as before. So it does not matter how the code
comes to its sizes: ``int(c / 2)``, ``1 << k``, a table in another module are right when what they lead to is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UnknownName
from ..operations.labels import Array, Labels
from ..operations.notation import Value
from .dice import RUNNING, same_dice
from .functions import DATA, DEVICE, Functions
from .graph import Graph, Rerun
from .node import SHAPED, Node
from .outputs import Item, items, selected
from .record import META, Known, Recorder
from .surroundings import undisturbed_surroundings
from .trees import PLAIN, leaf_tensors
from .ways import Way

CLONE, SLICE = torch.ops.aten.clone.default, torch.ops.aten.slice.Tensor
VIEWS = frozenset((torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default))
BLOCKS = frozenset(("group", "groups"))  # numbers of equal blocks that an axis is taken apart into
SAME = frozenset((CLONE, torch.ops.aten.alias.default))
Mask = Callable[[Value, int], Array]  # the surviving positions along an axis of a tensor of the recorded run
Watch = Callable[[Node, list[torch.Tensor]], str]  # what is wrong with the results of a call, if anything


@dataclass(frozen=True)
class Difference:
    """The recorded call at which a cut model parts from what was promised (its number; one past the last where it ends too late), and how."""

    index: int
    text: str
    values: bool = False  # the calls are right, what they give is not
    place: str = ""  # operation, module and line
    number: bool = False  # a number is another with which every entry is computed: that an example comes out the same says nothing

    def before(self, other: Difference | None) -> bool:
        return other is None or (self.values, self.index) < (other.values, other.index)


class _Parted(BaseException):
    """Ends the run of the model; its code may catch exceptions."""


class _Calls(Functions):
    """Makes the calls as the recorded run made them, and gives out plain sizes."""

    def returned(self, kind: int, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, since: int) -> Any:
        if kind == DATA:
            self.recorder.values[id(args[0])] = self.recorder.value(args[1])
        return self.answered(kind, func, name, args, kwargs, result) if kind == DEVICE else result  # as the recorded run was answered


class Rehearsal(Recorder):
    """Sees every ATen call of a cut model's run beside the recorded one."""

    def __init__(self, graph: Graph, mask: Mask, real: bool, watch: Watch | None) -> None:
        super().__init__(Labels(), {}, [], real)
        self.graph, self.watch, self.at = graph, watch, 0
        self.expects, self.end = list(graph.nodes), len(graph.nodes)  # the recorded calls, and where those of the run at hand end
        self.mask = mask
        self.made: dict[int, torch.Tensor] = {}  # constants that no call made, by the id of their value
        self.copies: dict[int, Value] = {}  # of what a recorded copy that was not needed is one
        self.used = {id(value) for node in graph.nodes for value in node.held}.union(map(id, graph.outputs))
        self.masks: dict[tuple[int, ...], tuple[Array, int]] = {}
        self.difference: Difference | None = None

    def go_on(self, rerun: Rerun) -> None:
        """The next run is expected to make the calls of ``rerun``."""
        self.expects += [self.expects[-1]] * (rerun.start - len(self.expects)) + rerun.nodes  # what lies between is of runs that are not made again
        self.at, self.end = rerun.start, rerun.start + len(rerun.nodes)
        self.used |= {id(value) for node in rerun.nodes for value in node.held}.union(map(id, rerun.outputs))

    def value(self, tensor: torch.Tensor) -> Value:
        known = self.values.get(id(tensor))
        if known is None:
            known = Value(tuple(tensor.shape), leaf="<made>")
            self.made[id(known)] = tensor
            self.keep(tensor, known)
        return known

    def keep(self, tensor: torch.Tensor, value: Value) -> None:
        self.values[id(tensor)] = value
        self.alive.append(tensor)

    def part(self, text: str) -> None:
        self.difference = self.differing(text)
        raise _Parted

    def differing(self, text: str) -> Difference:
        if self.at >= self.end:
            return Difference(self.at, text, self.watch is not None)
        node = self.expects[self.at]
        return Difference(self.at, text, self.watch is not None, ", ".join(part for part in (node.op.short, node.module, node.line) if part))

    def note(
        self,
        known: Known,
        args: tuple[Any, ...],
        seen: tuple[Any, ...],
        named: dict[Any, Any],
        given: list[torch.Tensor],
        held: list[Value],
        results: list[torch.Tensor],
    ) -> None:
        """Compare a call with the recorded one; its results are known as the recorded results."""
        func = known.op.func
        if not results:
            return
        if func in SAME and (self.at >= self.end or self.expects[self.at].func is not func):
            self.keep(results[0], held[0])
            return
        node = self.expected(func, known.name, seen)
        if len(results) != len(node.outs):
            self.part(f"{node.func} has become {func}")
        self.compare(node, seen, named)
        self.judge(node, results)
        for tensor, value in zip(results, node.outs, strict=True):
            if args and tensor is args[0] and isinstance(node.args[0], Value) and id(node.args[0]) in self.copies:
                self.copies[id(value)] = seen[0]  # written to in place: what was a part is all of it by now
            else:
                self.keep(tensor, value)
        self.at += 1

    def judge(self, node: Node, results: list[torch.Tensor]) -> None:
        """The results that are used have the lengths that stay, and nothing against them is said by who watches."""
        for tensor, value in zip(results, node.outs, strict=True):
            if 0 in value.shape and 0 in tensor.shape:  # no entries, and so none that say which of its axes are cut
                continue
            if id(value) in self.used and any(length != self.length(value, dim) for dim, length in enumerate(tensor.shape)):
                self.part(f"a result of shape {tuple(tensor.shape)}")
        wrong = self.watch(node, results) if self.watch else ""
        if wrong:
            self.part(wrong)

    def expected(self, func: Any, name: str, args: tuple[Any, ...]) -> Node:
        """The recorded call that this one has to be; what is not needed for a shorter axis is passed over."""
        nodes = self.expects
        while self.at < self.end and self.needless(nodes[self.at], func, args):
            node = nodes[self.at]
            self.copies[id(node.outs[0])] = node.args[0]
            if self.watch:
                self.watch(node, [])
            self.at += 1
        if self.at >= self.end:
            self.part(f"a further call of {name}")
        node = nodes[self.at]
        if node.func is not func and not (node.func in VIEWS and func in VIEWS):
            self.part(f"{node.func} has become {func}")
        return node

    def needless(self, node: Node, func: Any, args: tuple[Any, ...]) -> bool:
        """A copy, which hangs on lengths of 1 where a tensor is seen in another shape, or a slice that by now would take all there is."""
        if node.func is CLONE:
            return func is not CLONE
        if node.func is not SLICE or (func is SLICE and args[1:2] == node.args[1:2]):
            return False
        source, *rest = node.args
        dim = rest[0] if rest else 0
        return self.length(source, dim) == self.length(node.outs[0], dim)

    def length(self, value: Value, dim: int) -> int:
        return self.along(value, dim)[1] if value.fields else value.shape[dim]

    def moves(self, value: Value, dim: int) -> bool:
        return self.along(value, dim)[0] is not None

    def kept(self, value: Value, dim: int) -> Array:
        stays = self.along(value, dim)[0]
        return np.ones(value.shape[dim], dtype=bool) if stays is None else stays

    def along(self, value: Value, dim: int) -> tuple[Array | None, int]:
        """The surviving positions of an axis (None: no cut changes it), and how many they are; most values share their fields with others."""
        key = (dim, *[id(field) for field in value.fields if field.shape[dim] > 1])
        if len(key) == 1:
            return None, value.shape[dim]
        known = self.masks.get(key)
        if known is None:
            stays = self.mask(value, dim)
            known = self.masks[key] = stays, int(stays.sum())
        return known

    def compare(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The arguments have to be the recorded ones, but for what the cut changes."""
        taken = node.op.entries
        if taken is not None and isinstance(node.args[0], Value) and args[0] is node.args[0] and not kwargs and not node.kwargs:
            self.entries(taken, node, args)
            return
        if node.func in VIEWS:
            self.same(node, "self", args[0], node.args[0])
            return
        names = node.op.arguments
        if len(args) != len(node.args) or kwargs.keys() != node.kwargs.keys():
            self.part("other arguments")
        for name, argument, other in zip(names, args, node.args, strict=False):
            self.same(node, name, argument, other)
        for name, argument in kwargs.items():
            self.same(node, name, argument, node.kwargs[name])

    def entries(self, taken: Callable[..., Any], node: Node, args: tuple[Any, ...]) -> None:
        """A call that takes entries by their positions has to take the same ones as before."""
        value, out = node.args[0], node.outs[0]
        for dim, length in enumerate(value.shape):
            stays = self.kept(value, dim)
            before, after = (taken(np.arange(n), dim, len(value.shape), *rest[1:]) for n, rest in ((length, node.args), (int(stays.sum()), args)))
            rank = np.append(np.cumsum(stays) - 1, -1)  # of position -1: an entry that is new
            alive = np.append(stays, True)[before]
            if len(out.shape) == len(value.shape) and self.moves(out, dim):
                alive &= self.kept(out, dim)
            if not np.array_equal(rank[before[alive]], after):
                self.part(f"positions {list(args[1:])} instead of {list(node.args[1:])}")

    def same(self, node: Node, name: str, argument: Any, recorded: Any) -> None:
        if isinstance(argument, Value):
            while argument is not recorded and isinstance(recorded, Value) and id(recorded) in self.copies:
                recorded = self.copies[id(recorded)]
            if argument is not recorded and not self.equal(argument, recorded):
                self.part(f"another tensor for {name}")
        elif type(argument) in PLAIN:
            if not _alike(argument, recorded) or name in BLOCKS:
                self.differs(node, name, argument, recorded)
        elif isinstance(argument, list | tuple):
            if not isinstance(recorded, list | tuple) or len(argument) != len(recorded):
                self.part(f"another number of entries for {name}")
            if all(type(item) is int for item in (*argument, *recorded)):
                if list(argument) != list(recorded):
                    self.differs(node, name, list(argument), list(recorded))
                return
            for left, right in zip(argument, recorded, strict=True):
                self.same(node, name, left, right)

    def differs(self, node: Node, name: str, argument: Any, recorded: Any) -> None:
        """Another number may be given where it says a shape, or still means the same entries."""
        if name not in SHAPED and not self.follows(node, name, argument, recorded):
            computed = node.op.pointwise or type(argument) is float or type(recorded) is float
            self.difference = replace(self.differing(f"{name}={argument} instead of {recorded}"), number=computed)
            raise _Parted

    def equal(self, value: Value, other: Any) -> bool:
        """Whether a constant that the code made holds what it held in the recorded run."""
        tensor, constant = self.made.get(id(value)), self.graph.constants.get(other.leaf) if isinstance(other, Value) else None
        if tensor is None or constant is None or tensor.shape != constant.shape or tensor.dtype != constant.dtype:
            return False
        if tensor.is_meta or constant.is_meta or not torch.equal(tensor, constant):
            return tensor.is_meta and constant.is_meta
        self.values[id(tensor)] = other
        return True

    def follows(self, node: Node, name: str, argument: Any, other: Any) -> bool:
        """Whether a number that changed still means the same entries, blocks or copies."""
        kind = node.op.short.rstrip("_")
        value = node.args[0]
        if not isinstance(value, Value) or not value.shape:
            return False
        if name in BLOCKS:  # the same number, too, is another one where whole blocks are gone
            dim = 1 if len(value.shape) > 1 else 0
            if not self.moves(value, dim):
                return argument == other
            blocks = self.kept(value, dim).reshape(other, -1).any(axis=1)
            return int(blocks.sum()) == argument
        if node.op.tallies:  # as many counts as there are positions, and what the last one is
            counts = node.outs[0]
            return argument - other == self.length(counts, len(counts.shape) - 1) - counts.shape[-1]
        if kind == "repeat" and name == "repeats":
            lead = len(other) - len(value.shape)
            return all(a == b or i < lead or value.shape[i - lead] == 1 for i, (a, b) in enumerate(zip(argument, other, strict=True)))
        return False


def _alike(one: Any, other: Any) -> bool:
    """Equality, under which nan is nan."""
    return one == other or (type(one) is float and type(other) is float and math.isnan(one) and math.isnan(other))


def rehearse(graph: Graph, small: nn.Module, mask: Mask, real: bool = False, watch: Watch | None = None) -> Difference | None:
    """Where the cut model ``small`` (without values unless ``real``) parts from the recorded calls, or None.

    ``mask`` gives the surviving positions along an axis of a recorded tensor, ``watch`` looks at the results of every call; with it, and with values, only
    the first run is made again, else the further ones are as well.
    """
    rehearsal = Rehearsal(graph, mask, real, watch)
    away = False
    for name, _, _, tensor in leaf_tensors(small):
        rehearsal.keep(tensor, graph.leaves.get(name) or Value(tuple(tensor.shape), leaf=name))
        away |= tensor.device.type not in ("cpu", "meta")
    swap = lambda t: t.detach().clone() if real or not t.is_floating_point() else t.detach().to(META)  # noqa: E731
    functions = _Calls(rehearsal, [], away, not away and not real)
    (inputs, call), *others = graph.asked.called(small, swap)
    difference = _rehearsed(rehearsal, functions, small, (inputs, graph.inputs), call, graph.outputs)
    for rerun in () if difference or real or watch else graph.reruns:
        if rerun.which < 0:
            small.train()
            inputs, call = next(graph.asked.called(small, swap))
        elif isinstance(graph.asked.others[rerun.which], Way):
            continue
        else:
            inputs, call = others[rerun.which]
        rehearsal.go_on(rerun)
        difference = _rehearsed(rehearsal, functions, small, (inputs, rerun.inputs), call, rerun.outputs)
        if difference:
            break
    return difference


def _rehearsed(
    rehearsal: Rehearsal,
    functions: _Calls,
    small: nn.Module,
    inputs: tuple[list[torch.Tensor], list[Value]],
    call: Callable[[], Any],
    outputs: list[Value],
) -> Difference | None:
    """One run; ``inputs`` are its tensors, and what they are in the recorded one."""
    graph = rehearsal.graph
    for tensor, value in zip(*inputs, strict=True):
        rehearsal.keep(tensor, value)
    try:
        with RUNNING, same_dice(away=True), ExitStack() as scopes:
            for scope in (torch.no_grad(), undisturbed_surroundings(small), rehearsal, functions):
                scopes.enter_context(scope)
            returned = [item for item in items(call()) if item[0].partition(".")[0] not in graph.state]
            result = [item for _, item in _chosen(returned, graph.asked.outputs) if isinstance(item, torch.Tensor)]
    except _Parted:
        return rehearsal.difference
    except Exception as error:
        return rehearsal.difference or rehearsal.differing(f"{type(error).__name__}: {error}".splitlines()[0])
    if rehearsal.difference:
        return rehearsal.difference
    wanted = {id(value) for value in outputs}
    if any(id(rehearsal.values.get(id(tensor))) not in wanted for tensor in result):
        return rehearsal.differing("another output")
    return rehearsal.differing("fewer calls") if rehearsal.at < rehearsal.end else None


def _chosen(returned: list[Item], outputs: Any) -> list[Item]:
    """What matters of a result; all of it where it has nothing of what was named."""
    try:
        return selected(returned, outputs)
    except UnknownName:
        return returned
