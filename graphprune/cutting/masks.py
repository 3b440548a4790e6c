# pyright: strict, reportUnnecessaryIsInstance=false, reportPrivateUsage=false
"""Weights with entries that are zero for good: :class:`Mask`, a parametrisation, and what one does with it.

A masked weight stays a parameter of full size; pruned entries are exact zeros and get exact zero gradients, so the model
trains on with any optimizer. The mask is a buffer: it moves, copies and saves with the model. :func:`bake` removes the
parametrisation and leaves the zeros; :func:`semi_structured` hands 2:4 masks to the hardware that has kernels for them.

>>> layer = nn.Linear(2, 1)
>>> mask(layer, "weight", torch.tensor([[True, False]]))
>>> float(layer.weight[0, 1].detach())
0.0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import BadModel, BadOption, BadPlan
from ..tracing.copies import duplicate
from ..tracing.fused import gathered
from .parts import Part, narrowed, unpack
from .plan import Plan, note_plan, plan_of


class Mask(nn.Module):
    """Zero where ``mask`` (boolean, of the weight's shape) is False; the gradient is zero there, too."""

    mask: torch.Tensor
    order: tuple[str, ...] = ()  # of the module's parameters, before

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # Not a product: 0 * inf would be nan, in the weight and in its gradient.
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def _own_class(module: nn.Module) -> None:
    """Copies of a parametrised module share the class that torch made for it, and it holds the properties: changing one would break the others."""
    if parametrize.is_parametrized(module):
        shared = type(module)
        inner = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, inner)  # pyright: ignore[reportAttributeAccessIssue]


def parametrizations(module: nn.Module) -> Any:
    """The parametrizations of a module, by the name of the parameter."""
    return module.parametrizations if parametrize.is_parametrized(module) else {}


def mask_of(module: nn.Module, name: str) -> Mask | None:
    """The mask over a module's parameter, if there is one."""
    steps = parametrizations(module)
    return next((step for step in steps[name] if isinstance(step, Mask)), None) if name in steps else None


def mask(module: nn.Module, name: str, keep: torch.Tensor) -> None:
    """Mask the parameter ``name`` of a module, in place; ``keep`` is boolean, of its shape. A second mask replaces the first."""
    old = mask_of(module, name)
    weight = parametrizations(module)[name].original if old else getattr(module, name)
    keep = keep.to(weight.device)
    # Weight decay and momentum then have nothing to move; not in place, so that what fails later can put the old values back.
    weight.data = weight.data.masked_fill(~keep, 0)
    if old:
        old.mask = keep
    else:
        added = Mask(keep)
        added.order = tuple(module._parameters)
        _own_class(module)
        parametrize.register_parametrization(module, name, added)


def masked(model: nn.Module) -> dict[str, torch.Tensor]:
    """The masks of a model by the name of the parameter, as the user knows it ("conv.weight"); True where an entry stays.

    >>> masked(nn.Linear(2, 2))
    {}
    """
    masks: dict[str, torch.Tensor] = {}
    for prefix, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name in parametrizations(module):
            mask = mask_of(module, name)
            if mask:
                masks[f"{prefix}.{name}" if prefix else name] = mask.mask
    return masks


def masks_of(small: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The masks that a plan put on a model, as they are now."""
    masks: dict[str, torch.Tensor] = {}
    for part in plan.parts:
        if part.kind == "mask":
            path, _, name = part.name.rpartition(".")
            layer = mask_of(small.get_submodule(path), name)
            if layer is None:
                raise BadPlan(f"the plan masks {part.name}, the model does not; bake() a model rather than removing parametrizations by hand")
            masks[part.name] = layer.mask
    return masks


def parameter_name(leaf: str) -> str:
    """The user's name of a parameter, from that of the tensor that a parametrisation keeps for it.

    >>> parameter_name("conv.parametrizations.weight.original"), parameter_name("conv.bias")
    ('conv.weight', 'conv.bias')
    """
    path, inside, rest = leaf.rpartition("parametrizations.")
    return path + rest.removesuffix(".original") if inside and rest.endswith(".original") else leaf


def check_mask(model: nn.Module, part: Part, shape: tuple[int, ...]) -> None:
    """Is there a parameter for a plan's ``mask`` part?"""
    path, _, name = part.name.rpartition(".")
    try:
        module = model.get_submodule(path)
        weight = parametrizations(module)[name].original if mask_of(module, name) else module.get_parameter(name)
        shape_here = tuple(weight.shape)
    except (AttributeError, KeyError) as error:
        raise BadPlan(f"the plan masks {part.name}, which this model does not have") from error
    if shape_here != tuple(shape):
        raise BadPlan(f"the plan masks {part.name} of shape {tuple(shape)}, this model's is {shape_here}")
    try:
        unpack(part.data, shape)
    except (TypeError, ValueError) as error:
        raise BadPlan(f"the plan's mask of {part.name} is damaged: {error}") from error


def apply_mask(model: nn.Module, part: Part, shape: tuple[int, ...], cuts: Mapping[int, Sequence[int]]) -> None:
    """Do what a plan's ``mask`` part says, to a weight of ``shape`` that ``cuts`` have cut."""
    path, _, name = part.name.rpartition(".")
    mask(model.get_submodule(path), name, narrowed(unpack(part.data, shape), cuts))


def bake(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model without mask parametrisations, its pruned entries plain zeros that training may move again.

    Names in ``state_dict`` are the original ones. Raises :class:`~graphprune.errors.BadModel` when nothing is masked.

    >>> layer = nn.Linear(2, 1)
    >>> mask(layer, "weight", torch.tensor([[True, False]]))
    >>> list(bake(layer).state_dict()), type(bake(layer)) is nn.Linear
    (['weight', 'bias'], True)
    """
    if not isinstance(inplace, bool):
        raise BadOption(f"inplace is {inplace!r}; it is True or False")
    names = list(masked(model))
    if not names:
        raise BadModel("no weight of this model is masked; there is nothing to bake")
    baked = model if inplace else duplicate(model, {})
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = baked.get_submodule(path)
        masking = mask_of(module, leaf)
        order = masking.order if masking is not None else ()
        _own_class(module)
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
        if set(order) == set(module._parameters):
            module._parameters = {key: module._parameters[key] for key in order}
    plan = plan_of(baked)
    if plan is not None:
        note_plan(baked, replace(plan, parts=tuple(p for p in plan.parts if p.kind != "mask")))
    return gathered(baked)


def semi_structured(model: nn.Module, inplace: bool = False) -> nn.Module:
    """A copy whose 2:4-masked linear weights are torch's semi-structured sparse tensors (compressed, for inference).

    Only CUDA devices of compute capability 8.0 or more have kernels for them, in float16, bfloat16 or int8; every other
    weight is baked. Raises :class:`~graphprune.errors.BadModel` elsewhere, or when no linear weight has a 2:4 mask.
    """
    names = masked(model)
    fits = [name for name, keep in names.items() if _two_of_four(model, name, keep)]
    if not fits:
        raise BadModel("no linear weight has a 2:4 mask; prune with granularity='2:4' first")
    check_device(names[fits[0]].device)
    wide = [name for name in fits if model.get_parameter(_original(name)).dtype not in (torch.float16, torch.bfloat16, torch.int8)]
    if wide:
        raise BadModel(f"semi-structured tensors are float16, bfloat16 or int8; {wide[0]} is not: call model.half() first")
    packed = {name: _compressed(model, name) for name in fits}
    small = bake(model, inplace)
    for name, weight in packed.items():
        path, _, key = name.rpartition(".")
        setattr(small.get_submodule(path), key, nn.Parameter(weight, requires_grad=False))
    return small


def check_device(device: torch.device) -> None:
    """Raises :class:`~graphprune.errors.BadModel` where torch has no kernels for semi-structured tensors."""
    if device.type != "cuda":
        raise BadModel(f"semi-structured tensors need a CUDA device, the masked weights lie on {device}; move the model, or keep the masks")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise BadModel("semi-structured tensors need compute capability 8.0 or more; keep the masks")


def _compressed(model: nn.Module, name: str) -> torch.Tensor:
    path, _, key = name.rpartition(".")
    weight = getattr(model.get_submodule(path), key).detach()
    try:
        return torch.sparse.to_sparse_semi_structured(weight)
    except (RuntimeError, ValueError) as error:
        raise BadModel(f"torch cannot compress {name} of shape {tuple(weight.shape)}: {error}; keep its mask, or keep it out (keep=)") from error


def _original(name: str) -> str:
    path, dot, key = name.rpartition(".")
    return f"{path}{dot}parametrizations.{key}.original"


def _two_of_four(model: nn.Module, name: str, keep: torch.Tensor) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(module, nn.Linear) or keep.shape[1] % 4:
        return False
    return bool((keep.reshape(len(keep), -1, 4).sum(-1) <= 2).all())
