"""Keep a cut model and get it back: safetensors for the weights, JSON for the plan, no pickle anywhere.

Of a masked weight the surviving entries are stored, and the mask as one bit per entry.

:func:`expand` undoes the cut's shapes: the original model with zeros where entries were removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import BadPlan
from ..tracing.trees import leaf_tensors
from .apply import apply
from .masks import mask_of, parameter_name
from .parts import Part, narrowed, pack, unpack, widened
from .plan import Plan


def save(small: nn.Module, folder: str | Path, plan: Plan | None = None) -> Path:
    """Write ``model.safetensors`` and ``plan.json`` into ``folder`` (made if needed); tensors that are tied are stored once.

    ``plan`` is the one :func:`shrink` gave the model; raises :class:`~graphprune.errors.BadPlan` when there is none.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    plan = _plan(small, plan)
    masks = _masks(small, plan)
    for name, _, _, tensor in leaf_tensors(small):
        if any(tensor is keep for keep in masks.values()):
            continue
        if stored.setdefault(id(tensor), name) == name:
            keep = masks.get(parameter_name(name))
            tensors[name] = (tensor.detach() if keep is None else tensor.detach()[keep]).contiguous().clone()
    for name, keep in masks.items():
        whole = widened(keep, plan.shapes[name], plan.cuts.get(name, {}))
        tensors[f"{name}.mask"] = torch.from_numpy(np.frombuffer(pack(whole), np.uint8).copy())
    save_file(tensors, folder / "model.safetensors")
    parts = tuple(Part("mask", part.name, None) if part.kind == "mask" else part for part in plan.parts)
    (folder / "plan.json").write_text(replace(plan, parts=parts).to_json())
    return folder


def _masks(small: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The masks that a plan put on a model, as they are now."""
    found = {}
    for part in plan.parts:
        if part.kind == "mask":
            path, _, name = part.name.rpartition(".")
            held = mask_of(small.get_submodule(path), name)
            if held is None:
                raise BadPlan(f"the plan masks {part.name}, the model does not; bake() a model rather than removing parametrizations by hand")
            found[part.name] = held.mask
    return found


def load(folder: str | Path, base: nn.Module) -> nn.Module:
    """The saved model: ``base`` (a fresh, uncut model of the same kind) cut by the plan and filled with the weights.

    Raises :class:`~graphprune.errors.BadPlan` when the files do not fit ``base``.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        plan = Plan.from_json((folder / "plan.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except OSError as error:
        raise BadPlan(f"{folder} holds no model saved by graphprune: {error}") from error
    try:
        bits = {part.name: weights.pop(f"{part.name}.mask").numpy().tobytes() for part in plan.parts if part.kind == "mask" and part.data is None}
        plan = replace(plan, parts=tuple(replace(part, data=bits[part.name]) if part.kind == "mask" and part.name in bits else part for part in plan.parts))
        small = apply(base, plan)
    except BadPlan:
        raise
    except (KeyError, ValueError) as error:
        raise BadPlan(f"the masks in {folder} do not fit the plan: {error}") from error
    masks = _masks(small, plan)
    with torch.no_grad():
        for name, _, _, tensor in leaf_tensors(small):
            if name in weights:
                if parameter_name(name) in bits and name not in bits:
                    keep = masks[parameter_name(name)]
                    if weights[name].shape != tensor[keep].shape:
                        raise BadPlan(f"{name} was saved with {weights[name].numel()} entries, its mask keeps {int(keep.sum())}")
                    tensor.masked_scatter_(keep, weights[name].to(tensor))
                    continue
                if tensor.shape != weights[name].shape:
                    raise BadPlan(f"{name} was saved with shape {tuple(weights[name].shape)}, the base gives {tuple(tensor.shape)}")
                tensor.copy_(weights[name])
    small.__dict__["graphprune_plan"] = plan
    return small


def expand(small: nn.Module, plan: Plan | None = None, *, partial: bool = False) -> dict[str, torch.Tensor]:
    """The weights padded back to the original shapes, zero where entries were removed: a state by tensor name.

    Raises :class:`~graphprune.errors.BadPlan` where whole modules were removed (granularity "block" or "layer"): no weights make a module
    hand on its input in general (behind an activation or a norm, zeros do not). ``partial=True`` gives the tensors of all other modules.

    >>> import graphprune
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> {name: tuple(tensor.shape) for name, tensor in expand(graphprune.shrink(net, torch.zeros(1, 4))).items() if "weight" in name}
    {'0.weight': (8, 4), '2.weight': (2, 8)}
    """
    plan = _plan(small, plan)
    gone = [part.name for part in plan.parts if part.kind == "skip"]
    if gone and not partial:
        text = f"the plan removed {', '.join(gone[:3])}{', …' if len(gone) > 3 else ''}, and no weights stand for a module that is gone"
        raise BadPlan(f"{text}; expand(..., partial=True) gives the tensors of all others")
    wide: dict[str, torch.Tensor] = {}
    thin = {part.name: unpack(part.data, tuple(plan.shapes[part.name][1:])) for part in plan.parts if part.kind == "columns"}
    indices = tuple(f"{name.removesuffix('weight')}channels" for name in thin)
    masks = _masks(small, plan)
    tied = {id(tensor): leaf for leaf, _, _, tensor in leaf_tensors(small) if leaf in plan.cuts}  # cut under one name
    for leaf, _, _, tensor in leaf_tensors(small):
        own = leaf if leaf in plan.cuts else parameter_name(leaf)
        name, data = own if own in plan.cuts else tied.get(id(tensor), own), tensor.detach()
        if any(tensor is keep for keep in masks.values()) or (indices and leaf.startswith(indices)):
            continue
        if name in plan.numbers:
            old = [i for i, n in enumerate(plan.numbers[name]) if n >= 0]
            data = torch.tensor(old, device=data.device, dtype=data.dtype)[data.long()]
        if name in thin:
            data = _spread(data, thin[name], plan.cuts.get(name, {}))
        for axis, kept in plan.cuts.get(name, {}).items():
            shape = list(data.shape)
            shape[axis] = plan.shapes[name][axis]
            index = torch.tensor(kept, device=data.device)
            data = data.new_zeros(shape).index_copy(axis, index, data)
        wide[own] = data if name in plan.cuts or name in thin else data.clone()
    return wide


def _spread(data: torch.Tensor, columns: torch.Tensor, cuts: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """A kernel from the product of its columns."""
    left = narrowed(columns, {axis - 1: kept for axis, kept in cuts.items() if axis})
    full = data.new_zeros((len(data), *left.shape))
    full.permute(0, 2, 3, 1)[:, left.permute(1, 2, 0)] = data
    return full


def _plan(small: nn.Module, plan: Plan | None) -> Plan:
    found = plan or small.__dict__.get("graphprune_plan")
    if found is None:
        raise BadPlan("the model carries no plan; pass the one that shrink(..., return_plan=True) returned")
    return found
