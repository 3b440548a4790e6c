"""The throw-away copy of a model that is run in its place: :func:`shadow`.

>>> twin, named = shadow(nn.Linear(2, 3), real=False)
>>> twin.weight.is_meta, [name for _, name in named]
(True, ['weight', 'bias'])
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .copies import OWN, duplicate
from .record import META
from .trees import is_parameter, leaf_tensors, modules_of


def shadow(model: nn.Module, real: bool) -> tuple[nn.Module, list[tuple[torch.Tensor, str]]]:
    """A throw-away copy that drops the weights (or copies them), and every tensor in it with its name."""
    memo: dict[int, Any] = {}
    named: list[tuple[torch.Tensor, str]] = []
    for name, _, _, tensor in leaf_tensors(model):
        if id(tensor) in memo:
            continue
        data = tensor.detach()
        if is_parameter(tensor):
            twin = nn.Parameter(data.clone() if real else data.to(META), False)
        else:
            twin = data.clone() if real or not data.is_floating_point() else data.to(META)
        memo[id(tensor)] = twin
        named.append((twin, name))
    copied = duplicate(model, memo)
    if forgetting(copied):
        still = {id(tensor) for *_, tensor in leaf_tensors(copied)}
        named = [(tensor, name) for tensor, name in named if id(tensor) in still]
    return evaluating(copied), named


def forgetting(model: nn.Module) -> bool:
    """Let modules forget what they put together of their weights for evaluation; whether any may have.

    Those do that have a ``train`` of their own and hold tensors that are neither parameters nor buffers. Modes, and which weights learn, are as they were.
    """
    told = False
    for _, module in modules_of(model):
        if type(module).train is not nn.Module.train and _caches(module):
            modes = [(inner, inner.training) for inner in module.modules()]
            learns = [(weight, weight.requires_grad) for weight in module.parameters()]
            with suppress(Exception):  # one that refuses another mode keeps what it has
                module.train(True)
                module.train(modes[0][1])
            for inner, mode in modes:
                inner.__dict__["training"] = mode
            for weight, learn in learns:
                weight.requires_grad_(learn)
            told = True
    return told


def _caches(module: nn.Module) -> bool:
    """Whether a module itself holds tensors, in attributes or in containers there, that are neither parameters nor buffers."""
    for name, item in module.__dict__.items():
        items = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else (item,)
        if name not in OWN and any(isinstance(each, torch.Tensor) for each in items):
            return True
    return False


def modal(module: nn.Module) -> bool:
    """Whether a module does something of its own where the mode changes."""
    return type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval


def evaluating(model: nn.Module) -> nn.Module:
    """``model.eval()``, without a call for each module unless one has its own."""
    modules = [module for _, module in modules_of(model)]
    if any(map(modal, modules)):
        model.eval()
        return model
    for module in modules:
        module.__dict__["training"] = False
    return model
