"""Sparse training: regularisers inside the user's own loop, one call after ``loss.backward()``.

They add the gradient of a penalty on whole units (all coupled slices of a channel, a head …) to ``.grad``, so that what
is cut afterwards is near zero already.

=============  ==================================================================  =====================================
kind           penalty                                                             source
=============  ==================================================================  =====================================
slimming       ``s * sum |gamma|`` over batch-norm scales                          Liu et al. 2017
group_lasso    ``s * sum_u sqrt(n_u) * ||w_u||``                                   Yuan & Lin 2006, over coupled groups
growing        ``l / 2 * sum ||w_u||^2`` over the picked units, ``l += s``         GReg-1, Wang et al. 2021
               every ``every`` steps, up to ``limit``
scaled         ``s * sum_u l_u ||w_u||^2``,                                        DepGraph, Fang et al. 2023
               ``l_u = 2^(a (max - ||w_u||^2) / (max - min))`` in each group
=============  ==================================================================  =====================================

``w_u``: all entries of unit u, at every place its group stands; ``n_u``: how many those are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..arrays import tensor_of
from ..coupling.groups import Group, couple
from ..cutting.verify import check_model
from ..errors import BadModel, BadRatio, NothingToPrune, UnknownName
from ..names import named
from ..scores import score
from ..select import check_ratio, select
from ..tracing.graph import Graph
from ..tracing.trace import trace
from ..tracing.trees import leaf_tensors

Place = tuple[str, int, torch.Tensor]
KINDS = ("slimming", "group_lasso", "growing", "scaled")


def _check_options(kind: str, numbers: dict[str, Any]) -> None:
    if kind not in KINDS:
        raise UnknownName(f"no regulariser named {kind!r}; there are {', '.join(KINDS)}")
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not math.isfinite(number) or number < (name == "every"):
            raise BadRatio(f"{name} is {number!r}; it is a number {'>= 1' if name == 'every' else '>= 0'}")


def _scales(graph: Graph) -> set[str]:
    """The names of the scales of all batch norms."""
    norms = [node.norm for node in graph.nodes]
    return {norm.weight.leaf for norm in norms if norm is not None and norm.kind == "batch" and norm.weight is not None}


class SparseTraining:
    """A regulariser of a model that is being trained; call :meth:`step` between ``loss.backward()`` and ``optimizer.step()``.

    ``strength`` is ``s`` above (for "growing" what is added to the strength at a time). ``keep`` leaves tensors out, as in
    :func:`graphprune.shrink`. For "growing", ``ratio`` of the units of every group are picked now, those with the lowest
    ``criterion``; ``every`` and ``limit`` shape the schedule. ``alpha`` is the ``a`` of "scaled". Nothing of the model is
    changed but ``.grad``. Raises :class:`~graphprune.errors.UnknownName` for another kind, BadRatio for a number out of range
    and NothingToPrune for a model without units (or without batch norm, for "slimming").

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> regulariser = SparseTraining(net, torch.zeros(1, 4), kind="group_lasso", strength=1e-3)
    >>> net(torch.ones(1, 4)).sum().backward()
    >>> regulariser.step()
    >>> float(regulariser.penalty().detach()) > 0
    True
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        kind: str = "group_lasso",
        strength: float = 1e-4,
        *,
        keep: Sequence[Any] | str = (),
        example_kwargs: dict[str, Any] | None = None,
        ratio: float = 0.5,
        criterion: Any = "l2",
        every: int = 10,
        limit: float = 1.0,
        alpha: float = 4.0,
    ) -> None:
        _check_options(kind, {"strength": strength, "limit": limit, "every": every, "alpha": alpha})
        check_ratio(ratio)
        check_model(model)
        graph = trace(model, example_input, example_kwargs)
        groups = couple(graph, tuple((name, None) for name in named(model, keep) if name in graph.leaves))
        self.model, self.kind, self.strength, self.every, self.limit, self.alpha = model, kind, float(strength), int(every), float(limit), float(alpha)
        self.steps = 0
        trained = {name for name, _, _, tensor in leaf_tensors(model) if isinstance(tensor, nn.Parameter)}
        self.sizes = [group.size for group in groups]
        self.places = [_places(group, trained) for group in groups]
        if kind == "slimming":
            scales = _scales(graph)
            self.places = [[place for place in places if place[0] in scales] for places in self.places]
        if not any(self.places):
            raise NothingToPrune(
                "no batch norm of this model scales units that can be cut" if kind == "slimming" else "this model has no units that can be cut"
            )
        kept = select(groups, score(groups, model, criterion), ratio) if kind == "growing" else []
        self.picked = [sorted(set(range(group.size)) - set(cast(Any, stay).tolist())) for group, stay in zip(groups, kept, strict=False)]

    @property
    def growth(self) -> float:
        """The strength that "growing" has reached."""
        return min(self.limit, self.strength * (1 + self.steps // self.every))

    def penalty(self) -> torch.Tensor:
        """The penalty as it is now, a scalar that autograd can differentiate; :meth:`step` adds its gradient."""
        weights = self._held()
        if self.kind == "slimming":
            return self.strength * torch.stack([weights[leaf][(units >= 0).nonzero().ravel()].abs().sum() for leaf, _, units in self._all()]).sum()
        total = torch.zeros((), dtype=next(iter(weights.values())).dtype, device=next(iter(weights.values())).device)
        for index in range(len(self.places)):
            squares = self._squares(index, weights)
            if self.kind == "group_lasso":
                safe = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
                total = total + self.strength * (self._entries(index, weights).sqrt().to(safe) * safe).sum()
            else:
                total = total + (self._weights(index, squares.detach()) / 2 * squares).sum()
        return total

    @torch.no_grad()
    def step(self) -> None:
        """Add the penalty's gradient to ``.grad`` (of parameters that want one); count one step."""
        leaves = self._held()
        if self.kind == "slimming":
            for leaf, _, units in self._all():
                self._add(leaves[leaf], self.strength * leaves[leaf].sign() * (units >= 0).to(leaves[leaf].device))
        else:
            factors: dict[str, torch.Tensor] = {}
            for index in range(len(self.places)):
                weights = self._weights(index, self._squares(index, leaves), self._entries(index, leaves))
                for leaf, axis, units in self.places[index]:
                    units = units.to(weights.device)
                    along = torch.where(units >= 0, weights[units.clamp(min=0)], 0)
                    along = along.reshape([-1 if a == axis else 1 for a in range(leaves[leaf].ndim)]).to(leaves[leaf])
                    factors[leaf] = factors[leaf] + along if leaf in factors else along
            for leaf, factor in factors.items():
                self._add(leaves[leaf], factor * leaves[leaf])
        self.steps += 1

    def norms(self) -> list[torch.Tensor]:
        """``||w_u||`` for every unit of every group: what the penalties push down."""
        weights = self._held()
        return [self._squares(index, weights).detach().sqrt() for index in range(len(self.places))]

    def _weights(self, index: int, squares: torch.Tensor, entries: torch.Tensor | None = None) -> torch.Tensor:
        """What the gradient multiplies ``w`` with, for every unit of a group."""
        if self.kind == "group_lasso":
            assert entries is not None
            return torch.where(squares > 0, self.strength * entries.sqrt().to(squares) / torch.where(squares > 0, squares, 1).sqrt(), 0)
        if self.kind == "growing":
            weights = torch.zeros_like(squares)
            weights[self.picked[index]] = self.growth
            return weights
        spread = squares.max() - squares.min()
        share = (squares.max() - squares) / spread if spread > 0 else torch.zeros_like(squares)
        return 2 * self.strength * 2 ** (self.alpha * share)

    def _squares(self, index: int, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """``||w_u||^2`` of the units of a group."""
        return self._summed(index, weights, lambda weight: weight.square())

    def _entries(self, index: int, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """How many entries a unit has."""
        return self._summed(index, weights, lambda weight: torch.ones((), dtype=weight.dtype, device=weight.device).expand(weight.shape))

    def _summed(self, index: int, weights: dict[str, torch.Tensor], entry: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """A function of single entries, summed over all entries of each unit."""
        first = weights[self.places[index][0][0]] if self.places[index] else next(iter(weights.values()))
        total = torch.zeros(self.sizes[index], dtype=first.dtype, device=first.device)
        for leaf, axis, units in self.places[index]:
            rest = [a for a in range(weights[leaf].ndim) if a != axis]
            along = entry(weights[leaf])
            along = along.sum(rest) if rest else along
            inside = (units >= 0).nonzero().ravel()
            total = total.index_add(0, units[inside].to(total.device), along[inside.to(along.device)].to(total))
        return total

    def _all(self) -> list[Place]:
        return [place for places in self.places for place in places]

    def _held(self) -> dict[str, torch.Tensor]:
        leaves = {name: tensor for name, _, _, tensor in leaf_tensors(self.model)}
        for leaf, axis, units in self._all():
            if leaf not in leaves or leaves[leaf].ndim <= axis or leaves[leaf].shape[axis] != len(units):
                raise BadModel(f"{leaf} is not what it was when the regulariser was made; make a new SparseTraining after cutting a model")
        return leaves

    @staticmethod
    def _add(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if not parameter.requires_grad:
            return
        gradient = gradient.to(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _places(group: Group, trained: set[str]) -> list[Place]:
    return [(leaf, axis, tensor_of(units)) for (leaf, axis), units in group.places.items() if leaf in trained]
