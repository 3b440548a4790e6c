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
from typing import Any

import torch
from torch import nn

from ..coupling.groups import Group, couple
from ..cutting.verify import check_model
from ..errors import BadModel, BadRatio, NothingToPrune, UnknownName
from ..names import named
from ..scores import score
from ..select import check_ratio, select
from ..tracing.trace import trace
from ..tracing.trees import leaf_tensors

Place = tuple[str, int, torch.Tensor]
KINDS = ("slimming", "group_lasso", "growing", "scaled")


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
        example_kwargs: dict | None = None,
        ratio: float = 0.5,
        criterion: Any = "l2",
        every: int = 10,
        limit: float = 1.0,
        alpha: float = 4.0,
    ) -> None:
        if kind not in KINDS:
            raise UnknownName(f"no regulariser named {kind!r}; there are {', '.join(KINDS)}")
        for name, number in (("strength", strength), ("limit", limit), ("every", every), ("alpha", alpha)):
            if not isinstance(number, int | float) or not math.isfinite(number) or number < (name == "every"):
                raise BadRatio(f"{name} is {number!r}; it is a number {'>= 1' if name == 'every' else '>= 0'}")
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
            norms = [norm for node in graph.nodes if (norm := node.norm) is not None and norm.kind == "batch"]
            scales = {norm.weight.leaf for norm in norms if norm.weight is not None}
            self.places = [[place for place in places if place[0] in scales] for places in self.places]
        if not any(self.places):
            raise NothingToPrune(
                "no batch norm of this model scales units that can be cut" if kind == "slimming" else "this model has no units that can be cut"
            )
        kept = select(groups, score(groups, model, criterion), ratio) if kind == "growing" else []
        self.picked = [sorted(set(range(group.size)) - set(stay.tolist())) for group, stay in zip(groups, kept, strict=False)]

    @property
    def growth(self) -> float:
        """The strength that "growing" has reached."""
        return min(self.limit, self.strength * (1 + self.steps // self.every))

    def penalty(self) -> torch.Tensor:
        """The penalty as it is now, a scalar that autograd can differentiate; :meth:`step` adds its gradient."""
        held = self._held()
        if self.kind == "slimming":
            return self.strength * torch.stack([held[leaf][(units >= 0).nonzero().ravel()].abs().sum() for leaf, _, units in self._all()]).sum()
        total = torch.zeros((), dtype=next(iter(held.values())).dtype, device=next(iter(held.values())).device)
        for index in range(len(self.places)):
            squares = self._squares(index, held)
            if self.kind == "group_lasso":
                safe = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
                total = total + self.strength * (self._entries(index, held).sqrt().to(safe) * safe).sum()
            else:
                total = total + (self._weights(index, squares.detach()) / 2 * squares).sum()
        return total

    @torch.no_grad()
    def step(self) -> None:
        """Add the penalty's gradient to ``.grad`` (of parameters that want one); count one step."""
        held = self._held()
        if self.kind == "slimming":
            for leaf, _, units in self._all():
                self._add(held[leaf], self.strength * held[leaf].sign() * (units >= 0).to(held[leaf].device))
        else:
            factors: dict[str, torch.Tensor] = {}
            for index in range(len(self.places)):
                weights = self._weights(index, self._squares(index, held), self._entries(index, held))
                for leaf, axis, units in self.places[index]:
                    units = units.to(weights.device)
                    along = torch.where(units >= 0, weights[units.clamp(min=0)], 0)
                    along = along.reshape([-1 if a == axis else 1 for a in range(held[leaf].ndim)]).to(held[leaf])
                    factors[leaf] = factors[leaf] + along if leaf in factors else along
            for leaf, factor in factors.items():
                self._add(held[leaf], factor * held[leaf])
        self.steps += 1

    def norms(self) -> list[torch.Tensor]:
        """``||w_u||`` for every unit of every group: what the penalties push down."""
        held = self._held()
        return [self._squares(index, held).detach().sqrt() for index in range(len(self.places))]

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

    def _squares(self, index: int, held: dict[str, torch.Tensor]) -> torch.Tensor:
        """``||w_u||^2`` of the units of a group."""
        return self._summed(index, held, lambda weight: weight.square())

    def _entries(self, index: int, held: dict[str, torch.Tensor]) -> torch.Tensor:
        """How many entries a unit has."""
        return self._summed(index, held, lambda weight: torch.ones((), dtype=weight.dtype, device=weight.device).expand(weight.shape))

    def _summed(self, index: int, held: dict[str, torch.Tensor], entry: Callable) -> torch.Tensor:
        """A function of single entries, summed over all entries of each unit."""
        first = held[self.places[index][0][0]] if self.places[index] else next(iter(held.values()))
        total = torch.zeros(self.sizes[index], dtype=first.dtype, device=first.device)
        for leaf, axis, units in self.places[index]:
            rest = [a for a in range(held[leaf].ndim) if a != axis]
            along = entry(held[leaf])
            along = along.sum(rest) if rest else along
            mine = (units >= 0).nonzero().ravel()
            total = total.index_add(0, units[mine].to(total.device), along[mine.to(along.device)].to(total))
        return total

    def _all(self) -> list[Place]:
        return [place for places in self.places for place in places]

    def _held(self) -> dict[str, torch.Tensor]:
        held = {name: tensor for name, _, _, tensor in leaf_tensors(self.model)}
        for leaf, axis, units in self._all():
            if leaf not in held or held[leaf].ndim <= axis or held[leaf].shape[axis] != len(units):
                raise BadModel(f"{leaf} is not what it was when the regulariser was made; make a new SparseTraining after cutting a model")
        return held

    @staticmethod
    def _add(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if not parameter.requires_grad:
            return
        gradient = gradient.to(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _places(group: Group, trained: set[str]) -> list[Place]:
    return [(leaf, axis, torch.from_numpy(units)) for (leaf, axis), units in group.places.items() if leaf in trained]
