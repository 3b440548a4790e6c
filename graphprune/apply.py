"""Do it: :func:`apply` cuts the tensors of a copy, changes the attributes that follow, and returns the copy.

Shapes of known torch modules follow from their own weights; other attributes are the plan's edits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .errors import BadPlan
from .kernels import apply_kernel
from .masks import apply_mask
from .passthrough import apply_skip
from .plan import Plan
from .trees import leaf_tensors

PARTS = {"mask": apply_mask, "kernel": apply_kernel, "columns": apply_kernel, "skip": apply_skip}


def apply(model: nn.Module, plan: Plan, inplace: bool = False) -> nn.Module:
    """The smaller model, of the same class; ``model`` is untouched unless ``inplace``.

    Raises :class:`~graphprune.errors.BadPlan` when the plan was made for other shapes.
    """
    cut, memo = {}, {}
    for name, _, _, tensor in leaf_tensors(model):
        if name in plan.cuts:
            if tuple(tensor.shape) != tuple(plan.shapes[name]):
                raise BadPlan(f"the plan cuts {name} of shape {tuple(plan.shapes[name])}, this model's is {tuple(tensor.shape)}")
            cut.setdefault(id(tensor), _cut(tensor, plan.cuts[name]))
        elif not inplace and not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    missing = set(plan.cuts) - {name for name, *_ in leaf_tensors(model)}
    if missing:
        raise BadPlan(f"the plan cuts {sorted(missing)[0]}, which this model does not have")
    if inplace:
        small = model
        for _, module, name, tensor in list(leaf_tensors(model)):
            if id(tensor) in cut:
                _put(module, name, cut[id(tensor)])
    else:
        small = copy.deepcopy(model, {**memo, **cut})
    for module in small.modules():
        _follow(module)
    for edit in plan.edits:
        _edit(small, edit[:-1], edit[-1])
    for part in plan.parts:
        PARTS[part.kind](small, part, plan.shapes.get(part.name, ()))
    return small


def _cut(tensor: torch.Tensor, axes: dict[int, list[int]]) -> torch.Tensor:
    data = tensor.detach()
    for axis, kept in axes.items():
        data = data.index_select(axis, torch.tensor(kept, device=data.device))
    last = data.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    data = data.contiguous(memory_format=torch.channels_last) if last else data.contiguous()
    if not isinstance(tensor, nn.Parameter):
        return data.requires_grad_(tensor.requires_grad)
    small = nn.Parameter(data, requires_grad=tensor.requires_grad)
    small.__dict__.update(tensor.__dict__)
    return small


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    for held in (module._parameters, module._buffers, module.__dict__):
        if name in held:
            held[name] = tensor
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, weight) for weight in module._flat_weights_names]


def _weight(module: nn.Module) -> Any:
    for name in ("weight", "weight_v", "running_mean"):
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is not None:
            return tensor
    held = getattr(module, "parametrizations", None)
    return getattr(module, "weight", None) if held is not None and "weight" in held else None


def _follow(module: nn.Module) -> None:
    """Attributes of torch's own modules that repeat the shapes of their weights."""
    if isinstance(module, nn.RNNBase):
        module.input_size = module.weight_ih_l0.shape[1]
        module.hidden_size = module.weight_hh_l0.shape[0] // {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        return
    weight = _weight(module)
    if weight is None or isinstance(weight, nn.UninitializedTensorMixin if hasattr(nn, "UninitializedTensorMixin") else ()):
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


def _edit(model: nn.Module, path: tuple, new: int) -> None:
    module = model.get_submodule(path[0])
    _set(module.__dict__, path[1], path[2:], new)
    if isinstance(module, nn.modules.conv._ConvNd) and path[1] == "groups":
        weight = _weight(module)
        if module.transposed:
            module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * new
        else:
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * new


def _set(holder: Any, key: Any, rest: tuple, new: int) -> None:
    if rest:
        inner = holder[key]
        items = list(inner)
        _set(items, rest[0], rest[1:], new)
        holder[key] = type(inner)(items)
    else:
        holder[key] = new
