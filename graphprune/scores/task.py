"""What a score works on: :class:`Task` holds the groups, the model's parameters by the graph's names, the links, and the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..coupling.groups import Group, Groups
from ..coupling.links import Link, links
from ..coupling.sums import Rows
from ..errors import UnknownName
from ..tracing.trees import is_parameter, leaf_tensors
from .data import Data, bar

Tensor = torch.Tensor
Scores = list[Tensor]
ROLES = ("all", "produces", "consumes", "passes")


class Stored(Mapping[str, Tensor]):
    """Parameters that are not in memory, by name: each is read as it is asked for, whole or (``pieces``) some rows at a time."""

    pieces: Mapping[str, Rows]


@dataclass(frozen=True)
class Task:
    """``stored``: where the values of the parameters are, if not in the model."""

    groups: Groups
    model: nn.Module
    source: Data | None = None
    name: str = "score"
    progress: bool = True
    stored: Stored | None = None

    @property
    def data(self) -> Data:
        """The batches; a score that says it needs them has them."""
        assert self.source is not None
        return self.source

    def steps(self, items: Iterable[Any]) -> Iterable[Any]:
        """The steps of long work, with a progress bar when they take more than a few seconds."""
        return bar(items, self.name, self.progress)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the model holds, by the name that the graph knows."""
        return {name: tensor for name, _, _, tensor in leaf_tensors(self.model) if name in self.groups.graph.leaves}

    @cached_property
    def parameters(self) -> Mapping[str, Tensor]:
        """The floating parameters, cut or not, by the name that the graph knows."""
        if self.stored is not None:
            return self.stored
        return {n: t for n, t in self.tensors.items() if isinstance(t, nn.Parameter) and t.is_floating_point() and not t.is_meta}

    @property
    def pieces(self) -> Mapping[str, Rows]:
        """The parameters, to be read some rows at a time."""
        if self.stored is not None:
            return self.stored.pieces
        return {name: tensor for name, tensor in self.tensors.items() if is_parameter(tensor) and not tensor.is_meta}

    @property
    def double(self) -> bool:
        """Whether any parameter is in float64, which sums in float32 would not do justice to."""
        return self.stored is None and any(tensor.dtype == torch.float64 for tensor in self.parameters.values())

    @cached_property
    def links(self) -> list[list[Link]]:
        return links(self.groups)

    def slices(self, values: Mapping[str, Tensor], over: str = "all", how: str = "sum", by: Callable[..., Any] | None = None) -> list[list[Tensor]]:
        """For every group, a float64 tensor (units,) for each coupled slice: the sum ("amax": largest) of ``by(values)`` over it.

        ``values`` maps names to tensors of the parameters' shapes; ``by`` works entry by entry (it may drop trailing axes
        that are never cut). Each tensor is read once and reduced along every axis that is cut, and the result is scattered
        by unit. ``over`` names the slices that count by their role.
        """
        places = [self.places(group, over) for group in self.groups]
        axes: dict[str, set[int]] = {}
        for name, axis, _ in (place for mine in places for place in mine):
            axes.setdefault(name, set()).add(axis)
        reduced = {name: _reduce(values[name], mine, how, by) for name, mine in axes.items() if name in values}
        return [[_scatter(reduced[n][a], units, g.size, how) for n, a, units in mine if n in reduced] for g, mine in zip(self.groups, places, strict=True)]

    def total(self, values: Mapping[str, Tensor], over: str = "all", by: Callable[..., Any] | None = None) -> Scores:
        """The sum of ``by(values)`` over all coupled slices of every unit."""
        parts = self.slices(values, over, by=by)
        return [sum(mine, torch.zeros(g.size, dtype=torch.float64)) for g, mine in zip(self.groups, parts, strict=True)]

    def places(self, group: Group, over: str = "all") -> list[tuple[str, int, Any]]:
        """The (tensor, axis, unit of each position) in which a group stands, for all roles or one."""
        if over == "all":
            return [(name, axis, units) for (name, axis), units in group.places.items()]
        if over not in ROLES:
            raise UnknownName(f"over is {over!r}; it is one of {', '.join(ROLES)}")
        return [(link.leaf, link.axis, link.units) for link in self.links[group.index] if link.role == over]

    def by(self, name: str) -> Scores:
        """The scores that another criterion gives for the same task."""
        from .registry import named  # a score may ask for another by name; the registry knows them all

        found = named(name)
        return found(self.groups, self.model, self.source and self.source.batches, self.source and self.source.loss, stored=self.stored)


def _reduce(tensor: Tensor, axes: set[int], how: str, by: Callable[..., Any] | None) -> dict[int, Tensor]:
    """The sum (or maximum) of all entries at each position of the axes; the two leading axes share one pass."""
    tensor = tensor.detach()
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    tensor = by(tensor) if by else tensor
    if how == "amax":
        return {axis: tensor.movedim(axis, 0).flatten(1).amax(1).double().cpu() if tensor.ndim > 1 else tensor.double().cpu() for axis in axes}
    plane = tensor.flatten(2).sum(2, dtype=torch.float64) if tensor.ndim > 2 and axes <= {0, 1} else tensor
    return {
        axis: plane.sum([a for a in range(plane.ndim) if a != axis], dtype=torch.float64).cpu() if plane.ndim > 1 else plane.double().cpu() for axis in axes
    }


def _scatter(sums: Tensor, units: Any, size: int, how: str) -> Tensor:
    index = torch.from_numpy(units)
    mine = index >= 0
    found = torch.zeros(size, dtype=torch.float64)
    if how == "amax":
        return found.scatter_reduce(0, index[mine], sums[mine], "amax", include_self=False)
    return found.index_add_(0, index[mine], sums[mine])
