"""What else holds the model's tensors: optimizers with their state, and averaged copies, cut by the same plan.

An optimizer keeps its identity, its groups and their options, so schedulers and gradient scalers stay attached.

>>> from ..shrink import shrink
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
>>> net(torch.ones(1, 4)).sum().backward(); optimizer.step()
>>> small, plan = shrink(net, torch.zeros(1, 4), ratio=0.5, return_plan=True)
>>> optimizer = refresh_optimizer(optimizer, plan, small, original=net)
>>> optimizer.param_groups[0]["params"][0] is small[0].weight, optimizer.state[small[0].weight]["momentum_buffer"].shape
(True, torch.Size([4, 4]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..cutting.apply import apply, cut_tensor, scaled
from ..cutting.compose import so_far
from ..cutting.gains import factors_of
from ..cutting.kernels import columns_of
from ..cutting.masks import parameter_name
from ..cutting.parts import GONE, narrowed, unpack
from ..cutting.plan import Plan, note_plan
from ..errors import BadOptimizer, BadPlan
from ..tracing.trees import leaf_tensors


def refresh_optimizer(optimizer: torch.optim.Optimizer, plan: Plan, small: nn.Module, original: nn.Module | None = None) -> torch.optim.Optimizer:
    """Make ``optimizer`` hold the parameters of ``small`` and the surviving entries of its state; returns it.

    Momentum, running averages and any other tensor of a parameter's shape are index-selected (a dimension of length 1,
    as in factored state, stays); counters are kept; so are groups and their options. ``plan`` is the one of *this* cut.
    ``original`` is the model before it, not needed after ``inplace=True`` or when the optimizer was built from
    ``named_parameters()``. Call it between two steps: gradients are not carried over. Parameters of other modules in
    the same optimizer are left alone. Raises :class:`~graphprune.errors.BadOptimizer`, and then changes nothing.
    """
    new = {parameter_name(name): tensor for name, _, _, tensor in leaf_tensors(small) if isinstance(tensor, nn.Parameter)}
    names = _names(new, original)
    plan = replace(plan, cuts=_plainly(plan.cuts), shapes=_plainly(plan.shapes))
    changed = {*plan.cuts, *(part.name for part in plan.parts)}
    removed = tuple(f"{part.name}." for part in plan.parts if part.kind in GONE)
    params: list[list[Any]] = []
    state: dict[Any, Any] = {}
    known = False
    for group in optimizer.param_groups:
        params.append([])
        for at, old in enumerate(group["params"]):
            name = names.get(id(old)) or _named(group, at, new)
            known |= name in new
            if name and name not in new and name.startswith(removed or "\0"):
                continue
            now = new.get(name, old) if name else old
            params[-1].append(now)
            if old in optimizer.state:
                state[now] = _state(optimizer.state[old], plan, name, name) if name and name in changed else optimizer.state[old]
    if not known:
        raise BadOptimizer(
            "the optimizer holds no parameter of this model. Pass original=, the model before the cut (its parameters are the ones "
            "the optimizer knows), or build the optimizer from model.named_parameters()"
        )
    for group, remaining in zip(optimizer.param_groups, params, strict=True):
        group["params"][:] = remaining
    optimizer.state.clear()
    optimizer.state.update(state)
    return optimizer


def _names(new: Mapping[str, nn.Parameter], original: nn.Module | None) -> dict[int, str]:
    """The names of the parameters before and after the cut, by their ids; a tied one has its first."""
    names = {id(tensor): name for name, tensor in reversed(list(new.items()))}
    for name, _, _, tensor in reversed(list(leaf_tensors(original)) if original is not None else []):
        names[id(tensor)] = parameter_name(name)
    return names


def _named(group: dict[Any, Any], at: int, new: Mapping[str, nn.Parameter]) -> str | None:
    """The name that an optimizer built from ``named_parameters()`` keeps, without the prefixes of wrappers."""
    name = group["param_names"][at] if "param_names" in group else ""
    while name and name not in new:
        name = name.partition(".")[2] if name.startswith(WRAPPERS) else ""
    return name or None


WRAPPERS = ("module.", "_orig_mod.")


def _state(state: Any, plan: Plan, name: str, path: str) -> Any:
    """The surviving part of one parameter's state."""
    if isinstance(state, dict):
        return {key: _state(item, plan, name, f"{path}[{key!r}]") for key, item in cast("dict[Any, Any]", state).items()}
    if isinstance(state, list | tuple):
        return type(cast(Any, state))([_state(item, plan, name, path) for item in cast("Sequence[Any]", state)])
    if not isinstance(state, torch.Tensor) or state.numel() == 1:
        return state
    shape = plan.shapes[name]
    if state.ndim != len(shape) or any(n not in (1, size) for n, size in zip(state.shape, shape, strict=True)):
        raise BadOptimizer(
            f"the state {path} has shape {tuple(state.shape)}, the plan cuts a parameter of shape {tuple(shape)}. Pass the plan of this cut alone "
            "(shrink(..., return_plan=True)), not one composed over several rounds; where the state has a form of its own, start a new optimizer"
        )
    cut = cut_tensor(state, {axis: kept for axis, kept in plan.cuts.get(name, {}).items() if state.shape[axis] == shape[axis]})
    return _parts(cut, plan, name) if state.shape == torch.Size(shape) else cut


def _parts(tensor: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    """What masks and columns leave of a tensor of the parameter's shape."""
    cuts = plan.cuts.get(name, {})
    for part in plan.parts:
        if part.name == name and part.kind == "mask":
            tensor = tensor.masked_fill(~narrowed(unpack(part.data, plan.shapes[name]), cuts).to(tensor.device), 0)
        elif part.name == name and part.kind == "columns":
            tensor = columns_of(tensor, narrowed(unpack(part.data, plan.shapes[name][1:]), {axis - 1: kept for axis, kept in cuts.items() if axis}))
    return tensor


def _plainly(table: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that parameters have for the user; a mask is none."""
    return {parameter_name(name): value for name, value in table.items()}


def refresh_ema(averaged: Any, plan: Plan) -> Any:
    """Cut an averaged copy of the model in place, and return it.

    ``averaged`` is a plain deep copy, a wrapper that holds one as ``.module`` (``torch.optim.swa_utils.AveragedModel``,
    DDP), or a dictionary of tensors by name. Raises :class:`~graphprune.errors.BadPlan` when it is not of this model.

    >>> from ..shrink import shrink
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> ema = torch.optim.swa_utils.AveragedModel(net)
    >>> small, plan = shrink(net, torch.zeros(1, 4), ratio=0.5, return_plan=True)
    >>> refresh_ema(ema, plan).module[0].out_features
    4
    """
    if isinstance(averaged, dict) and plan.parts:
        raise BadPlan("the plan changes more than axes (masks, kernels or modules): average a copy of the model, not a dictionary of tensors")
    if isinstance(averaged, dict):
        return _averages(cast("dict[str, torch.Tensor]", averaged), plan)
    inner = averaged
    known = {*plan.cuts, *(f"{part.name}." for part in plan.parts)}
    while not all(any(f"{leaf}.".startswith(name) for leaf, *_ in leaf_tensors(inner)) for name in known) and isinstance(
        getattr(inner, "module", None), nn.Module
    ):
        inner = inner.module
    whole = so_far(inner, plan)
    apply(inner, plan, inplace=True)
    note_plan(inner, whole)
    return averaged


def _averages(tensors: dict[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
    """The averaged tensors of :func:`refresh_ema`, cut in place."""
    wrong = [n for n, shape in plan.shapes.items() if n in tensors and tuple(tensors[n].shape) != tuple(shape)]
    if wrong or not set(plan.cuts) & set(tensors):
        raise BadPlan(f"the averaged tensors are not of the model that the plan cuts: {wrong[:1] or 'no name in common'}")
    factors = factors_of(plan.gains, tensors, plan.cuts)
    tensors.update({name: cut_tensor(tensors[name], axes) for name, axes in plan.cuts.items() if name in tensors})
    tensors.update({name: scaled(tensors[name], factor) for name, factor in factors.items()})
    return tensors
