# pyright: strict, reportUnnecessaryIsInstance=false
"""The cut's shapes undone: the original model's tensors with zeros where entries were removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import BadModel, BadPlan
from ..tracing.trees import leaf_tensors
from .masks import masks_of, parameter_name
from .parts import GONE, narrowed, unpack
from .plan import Plan, plan_of


def expand(small: nn.Module, plan: Plan | None = None, *, partial: bool = False) -> dict[str, torch.Tensor]:
    """The weights padded back to the original shapes, zero where entries were removed: a state by tensor name.

    Raises :class:`~graphprune.errors.BadPlan` where whole modules were removed (granularity "block" or "layer"): no weights make a module
    hand on its input in general (behind an activation or a norm, zeros do not). ``partial=True`` gives the tensors of all other modules.

    >>> import graphprune
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> {name: tuple(tensor.shape) for name, tensor in expand(graphprune.shrink(net, torch.zeros(1, 4))).items() if "weight" in name}
    {'0.weight': (8, 4), '2.weight': (2, 8)}
    """
    plan = known_plan(small, plan)
    if not partial:
        _check_modules(plan)
    wide: dict[str, torch.Tensor] = {}
    thin = {part.name: unpack(part.data, tuple(plan.shapes[part.name][1:])) for part in plan.parts if part.kind == "columns"}
    indices = tuple(f"{name.removesuffix('weight')}channels" for name in thin)
    masks = masks_of(small, plan)
    tied = {id(tensor): leaf for leaf, _, _, tensor in leaf_tensors(small) if leaf in plan.cuts}  # cut under one name
    for leaf, _, _, tensor in leaf_tensors(small):
        if any(tensor is mask for mask in masks.values()) or (indices and leaf.startswith(indices)):
            continue
        original = leaf if leaf in plan.cuts else parameter_name(leaf)
        name = original if original in plan.cuts else tied.get(id(tensor), original)
        wide[original] = _widened(name, tensor.detach(), plan, thin)
    return wide


def _check_modules(plan: Plan) -> None:
    gone = [part.name for part in plan.parts if part.kind in GONE]
    if gone:
        text = f"the plan removed {', '.join(gone[:3])}{', …' if len(gone) > 3 else ''}, and no weights stand for a module that is gone"
        raise BadPlan(f"{text}; expand(..., partial=True) gives the tensors of all others")


def _widened(name: str, data: torch.Tensor, plan: Plan, thin: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One tensor in its original shape; ``thin`` are the columns that stay of kernels that have become products."""
    if name in plan.numbers:
        old = [position for position, number in enumerate(plan.numbers[name]) if number >= 0]
        data = torch.tensor(old, device=data.device, dtype=data.dtype)[data.long()]
    if name in thin:
        data = _spread(data, thin[name], plan.cuts.get(name, {}))
    for axis, kept in plan.cuts.get(name, {}).items():
        shape = list(data.shape)
        shape[axis] = plan.shapes[name][axis]
        data = data.new_zeros(shape).index_copy(axis, torch.tensor(kept, device=data.device), data)
    return data if name in plan.cuts or name in thin else data.clone()


def _spread(data: torch.Tensor, columns: torch.Tensor, cuts: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """A kernel from the product of its columns."""
    columns = narrowed(columns, {axis - 1: kept for axis, kept in cuts.items() if axis})
    full = data.new_zeros((len(data), *columns.shape))
    full.permute(0, 2, 3, 1)[:, columns.permute(1, 2, 0)] = data
    return full


def known_plan(small: nn.Module, plan: Plan | None) -> Plan:
    """The plan that is given, or the one that the model carries."""
    if not isinstance(small, nn.Module):
        raise BadModel(f"the model is a {type(small).__name__}; an nn.Module is needed")
    known = plan_of(small) if plan is None else plan
    if known is not None and not isinstance(known, Plan):
        raise BadPlan(f"the plan is a {type(known).__name__}; give the one that shrink(..., return_plan=True) returned, or Plan.from_json(text)")
    if known is None:
        raise BadPlan("the model carries no plan; pass the one that shrink(..., return_plan=True) returned")
    return known
