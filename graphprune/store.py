"""Keep a cut model and get it back: safetensors for the weights, JSON for the plan, no pickle anywhere.

:func:`expand` undoes the cut's shapes: the original model with zeros where entries were removed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .apply import apply
from .errors import BadPlan
from .plan import Plan
from .trees import leaf_tensors


def save(small: nn.Module, folder: str | Path, plan: Plan | None = None) -> Path:
    """Write ``model.safetensors`` and ``plan.json`` into ``folder`` (made if needed); tensors that are tied are stored once.

    ``plan`` is the one :func:`shrink` gave the model; raises :class:`~graphprune.errors.BadPlan` when there is none.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, _, _, tensor in leaf_tensors(small):
        if stored.setdefault(id(tensor), name) == name:
            tensors[name] = tensor.detach().contiguous().clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "plan.json").write_text(_plan(small, plan).to_json())
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
    small = apply(base, plan)
    with torch.no_grad():
        for name, _, _, tensor in leaf_tensors(small):
            if name in weights:
                if tensor.shape != weights[name].shape:
                    raise BadPlan(f"{name} was saved with shape {tuple(weights[name].shape)}, the base gives {tuple(tensor.shape)}")
                tensor.copy_(weights[name])
    small.__dict__["graphprune_plan"] = plan
    return small


def expand(small: nn.Module, plan: Plan | None = None) -> dict[str, torch.Tensor]:
    """The weights padded back to the original shapes, zero where entries were removed: a state by tensor name."""
    plan = _plan(small, plan)
    wide: dict[str, torch.Tensor] = {}
    for name, _, _, tensor in leaf_tensors(small):
        data = tensor.detach()
        if name in plan.numbers:
            old = [i for i, n in enumerate(plan.numbers[name]) if n >= 0]
            data = torch.tensor(old, device=data.device, dtype=data.dtype)[data.long()]
        for axis, kept in plan.cuts.get(name, {}).items():
            shape = list(data.shape)
            shape[axis] = plan.shapes[name][axis]
            index = torch.tensor(kept, device=data.device)
            data = data.new_zeros(shape).index_copy(axis, index, data)
        wide[name] = data if name in plan.cuts else data.clone()
    return wide


def _plan(small: nn.Module, plan: Plan | None) -> Plan:
    found = plan or small.__dict__.get("graphprune_plan")
    if found is None:
        raise BadPlan("the model carries no plan; pass the one that shrink(..., return_plan=True) returned")
    return found
