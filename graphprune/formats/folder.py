"""Keep a cut model and get it back: safetensors for the weights, JSON for the plan, no pickle anywhere.

Of a masked weight the surviving entries are stored, and the mask as one bit per entry.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..cutting.apply import apply
from ..cutting.expand import plan_of
from ..cutting.masks import masks_of, parameter_name
from ..cutting.parts import Part, pack, widened
from ..cutting.plan import Plan
from ..errors import BadPlan
from ..tracing.trees import leaf_tensors


def save(small: nn.Module, folder: str | Path, plan: Plan | None = None) -> Path:
    """Write ``model.safetensors`` and ``plan.json`` into ``folder`` (made if needed); tensors that are tied are stored once.

    ``plan`` is the one :func:`shrink` gave the model; raises :class:`~graphprune.errors.BadPlan` when there is none.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    plan = plan_of(small, plan)
    masks = masks_of(small, plan)
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
    masks = masks_of(small, plan)
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
