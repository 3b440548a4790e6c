"""A run of several phases that survives being killed at any point: what is finished is on disk, whole, or not there.

A folder holds one sub-folder per model that is still needed (safetensors and JSON, as :func:`graphprune.save` writes
them, so :func:`graphprune.load` reads them) and ``state.json``. Renaming the new ``state.json`` over the old one is the
only step that counts: before it the run stands where it stood, after it the phase is finished. No pickle anywhere.

>>> import tempfile
>>> folder = Checkpoint(tempfile.mkdtemp())
>>> folder.commit({"done": 1}); folder.read()["done"]
1
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..cutting.plan import Plan
from ..errors import BadLoop
from ..formats.atomic import sync, write
from ..formats.folder import restore, save
from ..tracing.trees import leaf_tensors

STATE, ROUND = "state.json", "round-"


class Checkpoint:
    """The folder of a run; ``Checkpoint(None)`` keeps nothing."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder is not None else None

    def read(self) -> dict[Any, Any] | None:
        """The state after the last finished phase, or None."""
        if self.folder is None or not (self.folder / STATE).exists():
            return None
        try:
            return json.loads((self.folder / STATE).read_text())
        except ValueError as error:
            raise BadLoop(f"{self.folder / STATE} was not written by graphprune ({error}); use another folder") from error

    def keep(self, name: str, model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write a model (relative to the original by ``plan``) into the sub-folder ``name``; it counts once a state names it."""
        if self.folder is None:
            return
        part = self.folder / f".{name}"
        shutil.rmtree(part, ignore_errors=True)
        save(model, part, plan)
        (part / "layout.json").write_text(json.dumps(_layout(model)))
        if optimizer is not None:
            _save_optimizer(optimizer, part)
        for path in part.iterdir():
            sync(path)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(part, self.folder / name)
        sync(self.folder)

    def commit(self, state: Mapping[str, Any]) -> None:
        """The phase is finished: ``state`` replaces the old one, with the random states of now; what it does not name is deleted."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / STATE, json.dumps({**state, "random": random_states()}))
        named = {value for value in state.values() if isinstance(value, str)}
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in named and path.name.lstrip(".").startswith(ROUND):
                shutil.rmtree(path, ignore_errors=True)

    def model(self, name: str, original: nn.Module) -> nn.Module:
        """The model of a sub-folder, in the layout, modes and dtypes it was saved in."""
        assert self.folder is not None
        small = restore(self.folder / name, original, cast=True)
        _restore(small, json.loads((self.folder / name / "layout.json").read_text()))
        return small

    def optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        assert self.folder is not None
        _load_optimizer(optimizer, self.folder / name)


def _layout(model: nn.Module) -> dict[Any, Any]:
    """What a state dict does not tell: modes, gradients wanted, dtypes, and the order in memory, on which the last bits of sums depend."""
    leaves = {name: tensor for name, _, _, tensor in leaf_tensors(model)}
    return {
        "training": [name for name, module in model.named_modules() if module.training],
        "grads": [name for name, tensor in leaves.items() if tensor.requires_grad],
        "tensors": {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.stride())] for name, tensor in leaves.items()},
    }


def _restore(model: nn.Module, layout: dict[Any, Any]) -> None:
    training, grads = set(layout["training"]), set(layout["grads"])
    for name, module in model.named_modules():
        module.training = name in training
    for name, _, _, tensor in leaf_tensors(model):
        if name not in layout["tensors"]:
            if "[" in name:  # a cache
                continue
            raise BadLoop(f"{name} is in this model and not in the checkpoint's; is it the same class, with the same settings?")
        kind, strides = layout["tensors"][name]
        dtype = getattr(torch, kind)
        if tensor.dtype != dtype or list(tensor.stride()) != strides:
            tensor.data = torch.empty_strided(tensor.shape, strides, dtype=dtype, device=tensor.device).copy_(tensor.detach())
        if tensor.is_leaf and tensor.dtype.is_floating_point:
            tensor.requires_grad_(name in grads)


def random_states() -> dict[str, Any]:
    """The states of the generators of Python, numpy and torch (every device in use), as JSON can hold them."""
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    states = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()]
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_states`, also after a trip through JSON."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state((states["numpy"][0], np.array(states["numpy"][1], dtype=np.uint32), *states["numpy"][2:]))
    torch.set_rng_state(_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_bytes(state) for state in states["cuda"]])


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors, strides, plain = {}, {}, {}
    for index, param in enumerate(_params(optimizer)):
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"], strides[f"{index}.{key}"] = value.detach().contiguous().clone(), list(value.stride())
            else:
                plain[f"{index}.{key}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        text = json.dumps({"plain": plain, "groups": groups, "strides": strides})
    except TypeError as error:
        raise BadLoop(f"this {type(optimizer).__name__} has options or state that JSON cannot hold ({error}); build it inside train instead") from error
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(text)


def _load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    from safetensors.torch import load_file

    data = json.loads((folder / "optimizer.json").read_text())
    params = _params(optimizer)
    for path, value in {**load_file(folder / "optimizer.safetensors"), **data["plain"]}.items():
        index, _, key = path.partition(".")
        param = params[int(index)]
        if isinstance(value, torch.Tensor):
            device = param.device if value.ndim else value.device  # step counters stay where torch keeps them
            value = torch.empty_strided(value.shape, data["strides"][path], dtype=value.dtype, device=device).copy_(value)
        optimizer.state[param][key] = value
    for group, saved in zip(optimizer.param_groups, data["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in saved.items()})


def _params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]
