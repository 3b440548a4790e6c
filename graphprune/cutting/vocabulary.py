"""A smaller vocabulary, the last stage of a plan: :func:`check_tokens` compares the models before and after it.

A model with fewer tokens takes other ids, so that everything before that stage (checks, repairs) speaks of the ids of the original.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import NotEqual
from ..tracing.dice import same_dice
from ..tracing.outputs import items
from ..tracing.shadow import shadow
from ..tracing.surroundings import undisturbed_surroundings
from ..tracing.trees import leaf_tensors, modules_of
from ..tracing.trees import replace as exchange
from .tokens import Tokens

LIMITS = {torch.float64: 1e-8, torch.float32: 1e-3}  # largest relative difference; of shorter numbers 5e-2


def holders(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """The objects that modules keep and that can say what is in them (configurations), each once: (module, attribute, object)."""
    seen: set[int] = set()
    for name, module in modules_of(model):
        for key, value in module.__dict__.items():
            if hasattr(value, "to_dict") and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and id(value) not in seen:
                seen.add(id(value))
                yield name, key, value


def set_apart(model: nn.Module) -> None:
    """Give a model, in place, configurations of its own, since others may hold those that it has."""
    memo: dict[int, Any] = {}
    kept = {id(value) for _, _, value in holders(model)}
    for _, module in modules_of(model):
        for key, value in list(module.__dict__.items()):
            if id(value) in kept:
                module.__dict__[key] = copy.deepcopy(value, memo)


def check_tokens(whole: nn.Module, small: nn.Module, tokens: Tokens, example: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Raises :class:`~graphprune.errors.NotEqual` unless the model with fewer tokens gives those that stay what the whole one gives them."""
    if any(tensor.is_meta for *_, tensor in leaf_tensors(small)):
        return
    before, after = (_results(model, call) for model, call in ((whole, tokens.nearest(*example)), (small, tokens.example(*example))))
    if len(before) != len(after):
        raise NotEqual(f"with the smaller vocabulary the model returns {len(after)} tensors, instead of {len(before)}")
    for (path, wanted), (_, result) in zip(before, after, strict=True):
        wanted = _of_kept(wanted, result, tokens)
        name = f"the output {path!r}" if path else "the output"
        if wanted.shape != result.shape:
            raise NotEqual(f"with the smaller vocabulary {name} has shape {tuple(result.shape)} instead of {tuple(wanted.shape)}")
        if not result.numel() or not result.is_floating_point():
            continue
        finite = torch.isfinite(wanted)
        gap = (result - wanted)[finite].abs()
        size = float(wanted[finite].abs().max()) if len(gap) else 0.0
        if not torch.equal(torch.isfinite(result), finite) or len(gap) and float(gap.max()) > LIMITS.get(result.dtype, 5e-2) * (size or 1.0):
            raise NotEqual(
                f"with the smaller vocabulary {name} differs for tokens that stay (by {float(gap.max()) if len(gap) else 0:.1e}): "
                "the code does more with ids than to look them up; what={'vocabulary': ...} cannot be asked of this model"
            )


def _results(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[tuple[str, torch.Tensor]]:
    with torch.no_grad(), same_dice(), undisturbed_surroundings(model):
        args, kwargs = (exchange(part, lambda tensor: tensor.detach().clone()) for part in call)
        try:
            result = shadow(model, real=True)[0](*args, **kwargs)
        except Exception as error:
            raise NotEqual(f"the model with the smaller vocabulary does not run on the example: {type(error).__name__}: {error}") from error
        return [(path, item) for path, item in items(result) if isinstance(item, torch.Tensor)]


def _of_kept(wanted: torch.Tensor, result: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """A result of the whole model with the entries of the tokens that stay, along the axes that have one for each."""
    for axis, (before, after) in enumerate(zip(wanted.shape, result.shape, strict=False)):
        if before == tokens.size and after == len(tokens):
            wanted = wanted.index_select(axis, torch.tensor(tokens.kept, device=wanted.device))
    return wanted
