"""Do it: :func:`apply` cuts the tensors of a copy, changes the attributes that follow, and returns the copy.

Shapes of known torch modules follow from their own weights; other attributes are the plan's edits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import BadPlan
from ..tracing.copies import duplicate
from ..tracing.fused import gathered
from ..tracing.shadow import forgetting
from ..tracing.symbols import SHAPED
from ..tracing.trees import Leaf, is_parameter, leaf_tensors, modules_of, replace
from .gains import factors_of
from .kernels import apply_kernel, check_kernel
from .masks import apply_mask, check_mask, parametrizations
from .passthrough import apply_experts, apply_skips, check_expert, check_skip
from .plan import Plan
from .rewrite import spell
from .undo import undone
from .vocabulary import set_apart

# What is checked before anything is touched, and what is done; modules that are skipped go last, all together.
CHECKS = {"mask": check_mask, "kernel": check_kernel, "columns": check_kernel, "skip": check_skip, "expert": check_expert}
CHANGES = {"mask": apply_mask, "kernel": apply_kernel, "columns": apply_kernel}

# Entries of a piece, and how many pieces an array may have that is made in one go (allocators keep memory of that size at hand).
PIECE, SMALL = 2**16, 8


def apply(model: nn.Module, plan: Plan, inplace: bool = False) -> nn.Module:
    """The smaller model, of the same class; ``model`` is untouched unless ``inplace``.

    Raises :class:`~graphprune.errors.BadPlan` when the plan was made for other shapes. What fails in place leaves the model as it was.
    """
    if inplace:
        with undone(model, plan.edits):
            return _apply(model, plan, inplace=True)
    return _apply(model, plan, inplace=False)


def _apply(model: nn.Module, plan: Plan, inplace: bool) -> nn.Module:
    leaves = list(leaf_tensors(model))
    smaller = _smaller(leaves, plan)
    _check(model, leaves, plan)
    if inplace and plan.tokens is not None:
        set_apart(model)
    small = _exchanged(model, leaves, smaller) if inplace else duplicate(model, {**_copies(leaves, smaller), **smaller})
    if plan.rewrites:
        small = spell(small, plan.rewrites)
    touched = {_holder(name, key) for name, _, key, tensor in leaves if id(tensor) in smaller}
    for path, module in modules_of(small):
        if module._forward_pre_hooks:
            _remake(module)
        if path in touched:
            _follow(module)
    for edit in plan.edits:
        _edit(small, edit[:-1], edit[-1])
    for part in plan.parts:
        if part.kind in CHANGES:
            CHANGES[part.kind](small, part, plan.shapes.get(part.name, ()), plan.cuts.get(part.name, {}))
    apply_skips(small, [part for part in plan.parts if part.kind == "skip"])
    apply_experts(small, [part for part in plan.parts if part.kind == "expert"])
    forgetting(small)  # caches were made of the whole weights
    return gathered(small)


def _holder(name: str, own: str) -> str:
    """The path of the module whose tensor it is, or whose tensor is made of it.

    >>> _holder("0.conv.weight", "weight"), _holder("weight", "weight"), _holder("fc.parametrizations.weight.original", "original")
    ('0.conv', '', 'fc')
    """
    path = name[: -len(own)].removesuffix(".")
    return f".{path}".partition(".parametrizations.")[0][1:]


def _smaller(leaves: list[Leaf], plan: Plan) -> dict[int, torch.Tensor]:
    """What takes the place of the tensors that a plan changes, by the id of the old one."""
    smaller: dict[int, torch.Tensor] = {}
    indices: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for name, _, _, tensor in leaves:
        if name in plan.numbers and id(tensor) not in smaller:
            smaller[id(tensor)] = _renumbered(name, tensor, plan, indices)
        if name not in plan.cuts:
            continue
        if tuple(tensor.shape) != tuple(plan.shapes[name]):
            raise BadPlan(f"the plan cuts {name} of shape {tuple(plan.shapes[name])}, this model's is {tuple(tensor.shape)}")
        if id(tensor) not in smaller:
            smaller[id(tensor)] = cut_tensor(tensor, plan.cuts[name], indices)
    if plan.gains:
        named = {name: tensor for name, _, _, tensor in leaves}
        for name, scale in factors_of(plan.gains, named, plan.cuts).items():
            whole = named[name]
            smaller[id(whole)] = scaled(smaller[id(whole)] if id(whole) in smaller else cut_tensor(whole, {}), scale)
    return smaller


def _renumbered(name: str, tensor: torch.Tensor, plan: Plan, indices: dict[tuple[Any, ...], tuple[Any, ...]]) -> torch.Tensor:
    """A buffer of positions, with the positions as they are counted after the cut."""
    numbers = torch.tensor(plan.numbers[name], device=tensor.device, dtype=tensor.dtype)
    kept = cut_tensor(tensor, plan.cuts.get(name, {}), indices).long()
    if len(kept) and not -len(numbers) <= int(kept.min()) <= int(kept.max()) < len(numbers):
        raise BadPlan(f"{name} numbers positions that the plan does not know: is it the same model?")
    return numbers[kept]


def _check(model: nn.Module, leaves: list[Leaf], plan: Plan) -> None:
    """Does the model have all that the plan changes?"""
    missing = {name for name in plan.cuts.keys() - {name for name, *_ in leaves} if "[" not in name}  # a cache may be empty
    if missing:
        raise BadPlan(f"the plan cuts {sorted(missing)[0]}, which this model does not have")
    for part in plan.parts:
        if part.kind not in CHECKS:
            raise BadPlan(f"the plan asks for {part.kind!r}, which this version does not know")
        CHECKS[part.kind](model, part, plan.shapes.get(part.name, ()))


def _exchanged(model: nn.Module, leaves: list[Leaf], smaller: dict[int, torch.Tensor]) -> nn.Module:
    """The model itself, with other tensors in the places of those by whose ids they go."""
    for _, module, name, tensor in leaves:
        if id(tensor) not in smaller:
            continue
        if "[" in name:
            holder = name.partition("[")[0]
            module.__dict__[holder] = replace(module.__dict__[holder], lambda item: smaller.get(id(item), item))
        else:
            _put(module, name, tensor, smaller[id(tensor)])
    return model


def _copies(leaves: list[Leaf], smaller: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Copies of the tensors that ``copy.deepcopy`` refuses (results of a computation), or is slow on: it takes 20 times as long for plain scalars."""
    return {
        id(tensor): tensor.detach().clone().requires_grad_(tensor.is_leaf and tensor.requires_grad)
        for *_, tensor in leaves
        if id(tensor) not in smaller and (not tensor.is_leaf or (type(tensor) is torch.Tensor and not tensor.ndim and not tensor.__dict__))
    }


def cut_tensor(tensor: torch.Tensor, axes: dict[int, list[int]], indices: dict[tuple[Any, ...], tuple[Any, ...]] | None = None) -> torch.Tensor:
    """The given positions of the given axes, in the same kind of tensor and the same memory format.

    ``indices`` remembers what positions that several tensors share have become.
    """
    indices = {} if indices is None else indices
    data = tensor.detach()
    picks = []
    for axis, kept in axes.items():
        if not 0 <= axis < data.ndim:
            raise BadPlan(f"the plan cuts axis {axis} of a tensor with {data.ndim}: it was made for another model, or damaged")
        key = id(kept), data.device
        if key not in indices:
            at = np.array(kept, dtype=np.int64)
            indices[key] = torch.from_numpy(at).to(data.device), bool(at.size) and int(at.min()) < 0, int(at.max(initial=-1))
        index, negative, last = indices[key]
        if negative or last >= data.shape[axis]:
            raise BadPlan(f"the plan keeps positions of an axis of {data.shape[axis]} that are not there: it was made for another model, or damaged")
        picks.append((axis, index))
    last = data.ndim == 4 and not data.is_contiguous() and data.is_contiguous(memory_format=torch.channels_last)
    data = _picked(data, picks)
    data = data.contiguous(memory_format=torch.channels_last) if last else data.contiguous()
    if not is_parameter(tensor):
        return data.requires_grad_(tensor.requires_grad)
    return _parameter(data, tensor)


def scaled(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The tensor times a factor, in the same kind of tensor."""
    data = (tensor.detach() * factor.to(tensor.device)).to(tensor.dtype)
    if not is_parameter(tensor):
        return data.requires_grad_(tensor.requires_grad)
    return _parameter(data, tensor)


def _parameter(data: torch.Tensor, old: torch.Tensor) -> nn.Parameter:
    """A parameter in the place of another, of its class and with the attributes that were written on it."""
    kind = type(old) if issubclass(type(old), nn.Parameter) and type(data) is torch.Tensor else nn.Parameter
    parameter: Any = nn.Parameter(data, old.requires_grad) if kind is nn.Parameter else torch.Tensor._make_subclass(kind, data, old.requires_grad)
    for name, value in vars(old).items():
        setattr(parameter, name, value)
    return parameter


def _picked(data: torch.Tensor, picks: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The given positions of each axis; of two axes, kernels in one go, and rows in pieces that stay in the cache."""
    if len(picks) < 2:
        return data.index_select(*picks[0]) if picks else data
    shape = tuple(data.shape)
    (_, rows), (axis, index) = picks[:2]
    count, step = rows.numel(), max(1, PIECE * shape[0] // max(1, data.numel()))
    kernel = math.prod(shape[2:])
    if len(picks) == 2 and picks[0][0] == 0 and axis == 1 and kernel > 1 and data.is_contiguous():
        if shape[0] * shape[1] < 2**31:  # half as many bytes to write and to read
            rows, index = rows.int(), index.int()
        chosen = (rows[:, None] * shape[1] + index).view(-1)
        return torch.embedding(data.view(-1, kernel), chosen).view(count, index.numel(), *shape[2:])
    if len(picks) != 2 or picks[0][0] != 0 or count <= SMALL * step or data.device.type != "cpu":
        for axis, index in picks:
            data = data.index_select(axis, index)
        return data
    picked = data.new_empty([count, *(index.numel() if a == axis else n for a, n in enumerate(shape) if a)])
    for start in range(0, count, step):
        torch.index_select(data.index_select(0, rows[start : start + step]), axis, index, out=picked[start : start + step])
    return picked


def _put(module: nn.Module, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    """A parameter stays the same object with less in it, so whoever holds it (an optimizer, a hook) holds the cut one."""
    if isinstance(old, nn.Parameter):
        old.grad = None
        old.data = new.data
        return
    tables: tuple[Any, ...] = (module._parameters, module._buffers, module.__dict__)
    for table in tables:
        if name in table:
            table[name] = new
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, weight) for weight in module._flat_weights_names]


# The names that a layer's weight goes by: its own, and those of what hooks of torch make it from.
WEIGHTS = ("weight", "weight_orig", "weight_v")


def _weight(module: nn.Module) -> Any:
    for name in WEIGHTS:
        if module._parameters.get(name) is not None:
            return module._parameters[name]
    steps = parametrizations(module)
    if "weight" in steps:
        return _made(module, steps["weight"])
    tables = (module._buffers, module.__dict__)
    return next((table[name] for table in tables for name in ("weight", "running_mean") if isinstance(table.get(name), Tensor)), None)


def _made(module: nn.Module, steps: nn.Module) -> Any:
    """The weight as its parametrization makes it, which in training mode would go on with what it keeps (the vectors of a spectral norm)."""
    modes = [(step, step.training) for step in steps.modules()]
    try:
        for step, _ in modes:
            step.training = False
        with torch.no_grad():
            return getattr(module, "weight", None)
    finally:
        for step, mode in modes:
            step.training = mode


def _remake(module: nn.Module) -> None:
    """The weights that torch's own hooks make before each call are made anew from what was cut."""
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
            elif isinstance(hook, WeightNorm):
                setattr(module, hook.name, hook.compute_weight(module))
            elif isinstance(hook, BasePruningMethod):
                setattr(module, hook._tensor_name, hook.apply_mask(module))


def _follow(module: nn.Module) -> None:
    """Attributes of torch's own modules that repeat the shapes of their weights."""
    if isinstance(module, nn.RNNBase):
        names = ("weight_ih_l0", "weight_hh_l0")
        module.input_size = getattr(module, names[0]).shape[1]
        module.hidden_size = getattr(module, names[1]).shape[0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        return
    weight = _weight(module) if isinstance(module, SHAPED) else None
    if weight is None or is_lazy(weight):
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        first, second = shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        elif module.groups == module.in_channels and second == 1:
            module.in_channels = module.groups = first if module.out_channels == module.in_channels else module.groups
            module.out_channels = first
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]


def _edit(model: nn.Module, path: tuple[Any, ...], new: int) -> None:
    try:
        module = model.get_submodule(path[0])
        _set(module.__dict__, path[1], path[2:], new)
    except (AttributeError, LookupError, TypeError) as error:
        name = ".".join(map(str, path))
        raise BadPlan(f"the plan sets {name} to {new}, which is no whole number of this model: it was made for another, or damaged") from error
    if isinstance(module, nn.modules.conv._ConvNd) and path[1] == "groups":
        weight = _weight(module)
        if module.transposed:
            module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * new
        else:
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * new


def _set(holder: Any, key: Any, rest: tuple[Any, ...], new: int) -> None:
    """Set ``holder[key]…``, a whole number, through lists and tuples (made anew), dictionaries and objects (changed)."""
    inner = holder[key]
    if not rest:
        if type(inner) is not int:
            raise TypeError(f"{key} is {type(inner).__name__}")
        holder[key] = new
    elif isinstance(inner, dict):
        _set(inner, rest[0], rest[1:], new)
    elif isinstance(inner, list | tuple):
        items = list(inner)
        _set(items, rest[0], rest[1:], new)
        holder[key] = type(inner)(items)
    else:
        _set(inner.__dict__, rest[0], rest[1:], new)
