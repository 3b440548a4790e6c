"""Where the units of a group show in the model's own run, and what passes there on real batches.

A group is seen at the distinct activations that its consumers read; where nothing consumes its units (the positions of
queries and keys), at what its producers make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..coupling.links import Link
from ..errors import BadInput, BadScore
from ..operations.notation import Value
from ..tracing.probe import watch
from ..tracing.trees import tensors
from .data import Data, gradient, one_by_one, samples
from .registry import cause
from .task import Task

Tensor = torch.Tensor


@dataclass(frozen=True)
class Place:
    """An activation of a group: units stand along ``dim``, ``along`` gives the unit of each position (-1: none)."""

    group: int
    value: Value
    dim: int
    along: Tensor
    readers: tuple[Link, ...]

    def by_unit(self, positions: Tensor, size: int) -> Tensor:
        """Sum what belongs to each position (last axis) by unit."""
        inside = self.along >= 0
        sums = torch.zeros(*positions.shape[:-1], size, dtype=torch.float64)
        return sums.index_add_(-1, self.along[inside], positions.double().cpu()[..., inside])


def places(task: Task) -> list[list[Place]]:
    """The places of every group, each activation once, with all consumers that read it."""
    every = []
    for group, links in zip(task.groups, task.links, strict=True):
        usable = [link for link in links if link.value is not None and (link.along >= 0).any()]
        read = [link for link in usable if link.role == "consumes"]
        by_axis: dict[tuple[int, int], list[Link]] = {}
        for link in read or [link for link in usable if link.role == "produces"]:
            by_axis.setdefault((id(link.value), link.dim), []).append(link)
        first = [(links[0], tuple(links) if read else ()) for links in by_axis.values()]
        shown = [(link, link.value, readers) for link, readers in first if link.value is not None]
        every.append([Place(group.index, value, link.dim, torch.from_numpy(link.along), readers) for link, value, readers in shown])
    return every


def _by_value(every: list[list[Place]]) -> tuple[list[Value], dict[int, list[Place]]]:
    at: dict[int, list[Place]] = {}
    values: dict[int, Value] = {}
    for place in (place for group_places in every for place in group_places):
        at.setdefault(id(place.value), []).append(place)
        values[id(place.value)] = place.value
    return list(values.values()), at


def finite(task: Task, place: Place, tensor: Tensor) -> Tensor:
    """The tensor; raises BadScore with the place when an entry is not finite, before a decomposition fails or a count hides it."""
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        group = task.groups.groups[place.group]
        raise BadScore(f"the score {task.name!r} meets an activation of group {group.index} ({group.name}) that is not finite; {cause(task.model)}")
    return tensor


def observe(task: Task, every: list[list[Place]], see: Callable[[Place, Tensor], None], begin: Callable[[int], None] | None = None) -> int:
    """Run all batches without gradients and show every place its activation; returns the number of samples.

    ``begin`` is told before each batch how many samples it holds.
    """
    values, at = _by_value(every)

    def show(value: Value, tensor: Tensor) -> None:
        for place in at[id(value)]:
            see(place, finite(task, place, tensor.detach()))

    count = 0
    with torch.no_grad(), watch(task.model, task.groups.graph, values, show):
        for batch in task.data:
            size = samples(batch)
            count += size
            if begin:
                begin(size)
            task.data.run(batch)
    return count


def observe_samples(task: Task, every: list[list[Place]], see: Callable[[Place, Tensor], None]) -> int:
    """As :func:`observe`, with the activation as (samples, positions, everything else)."""
    split = Samples(task, _by_value(every)[0])
    values, at = _by_value(every)

    def show(value: Value, tensor: Tensor) -> None:
        for place in at[id(value)]:
            see(place, split(value, finite(task, place, tensor.detach()), place.dim))

    count = 0
    for batch in task.data:
        count += samples(batch)
        split.learn(batch)
        with torch.no_grad(), watch(task.model, task.groups.graph, values, show):
            task.data.run(batch)
    return count


def gate_gradients(task: Task, every: list[list[Place]]) -> Iterator[list[Tensor]]:
    """For every batch and group ``∂L_n/∂m_c`` as (samples, units): the loss of each sample against a gate on the unit.

    The gate multiplies all places of the group, so their ``Σ a ∂L_n/∂a`` are added (before anything is squared).
    """
    values, at = _by_value(every)
    split = Samples(task, values)
    sums: list[Tensor] = []

    def show(value: Value, tensor: Tensor) -> None:
        if not tensor.requires_grad:
            return
        # What nobody reads as a weight's input may be overwritten in place before the gradient comes.
        copy = tensor.detach() if any(place.readers for place in at[id(value)]) else tensor.detach().clone()

        def collect(grad: Tensor) -> None:
            product = copy * grad
            for place in at[id(value)]:
                sums[place.group] += place.by_unit(split(value, product, place.dim).sum(-1), sums[place.group].shape[1])

        if split.count > 1:
            split.find(value, tensor)  # gradients cannot tell how samples stand, what a sample makes alone can
        tensor.register_hook(collect)

    for batch in task.data:
        count = samples(batch)
        split.learn(batch)
        sums = [torch.zeros(count, group.size, dtype=torch.float64) for group in task.groups]
        with watch(task.model, task.groups.graph, values, show):
            gradient(task.data, task.parameters, batch)
        yield [total * count for total in sums]


class Samples:
    """Tells the samples of a batch apart in any activation, by running one sample alone and finding it in the batch.

    Code puts the batch first, second, or together with tokens or windows on one axis, in either order.
    """

    def __init__(self, task: Task, values: list[Value]) -> None:
        self.task, self.values = task, values
        self.count = 1
        self.alone: dict[int, Tensor] = {}
        self.known: set[tuple[Any, ...]] = set()
        self.layout: dict[tuple[int, tuple[Any, ...], int], tuple[int, bool]] = {}

    def learn(self, batch: Any) -> None:
        """Run the first sample of a batch by itself, once for batches of the same shapes."""
        self.count = samples(batch)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors(batch, Tensor))
        if self.count == 1 or shapes in self.known:
            return
        self.known.add(shapes)
        data: Data = self.task.data
        with torch.no_grad(), watch(self.task.model, self.task.groups.graph, self.values, lambda v, t: self.alone.update({id(v): t.detach().clone()})):
            data.run(next(one_by_one(batch)))

    def __call__(self, value: Value, tensor: Tensor, dim: int) -> Tensor:
        """The tensor as (samples, positions along ``dim``, everything else)."""
        if self.count == 1:
            return tensor.movedim(dim, 0).flatten(1)[None] if tensor.ndim > 1 else tensor[None, :, None]
        axis, outer = self.find(value, tensor)
        wide = tensor.movedim((axis, dim), (0, 1)).flatten(2) if tensor.ndim > 2 else tensor.movedim(axis, 0)[..., None]
        parts = wide.reshape(self.count, -1, *wide.shape[1:]) if outer else wide.reshape(-1, self.count, *wide.shape[1:]).transpose(0, 1)
        return parts.transpose(1, 2).flatten(2)

    def find(self, value: Value, tensor: Tensor) -> tuple[int, bool]:
        """The axis along which samples stand, and whether a sample's positions stand together there."""
        key = (id(value), tuple(tensor.shape), self.count)
        if key not in self.layout:
            one = self.alone[id(value)]
            axis = next((a for a, (n, m) in enumerate(zip(tensor.shape, one.shape, strict=True)) if n == self.count * m and n != m), None)
            if axis is None:
                raise BadInput(f"no axis of an activation of shape {tuple(tensor.shape)} follows the batch of {self.count}; give batches of one sample")
            moved = tensor.detach().movedim(axis, 0)
            first = one.movedim(axis, 0)
            outer = (moved[: len(first)] - first).abs().max() <= (moved[:: self.count] - first).abs().max()
            self.layout[key] = (axis, bool(outer))
        return self.layout[key]
