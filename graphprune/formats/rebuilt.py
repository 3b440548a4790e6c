"""The class of a model, built again from its configuration: without values (:func:`builder`), with tables (:func:`unfilled`), with weights (:func:`loaded`).

Known here are two ways to keep a configuration, an object with ``to_dict`` and ``from_dict``, and a mapping with ``from_config``; no architecture is,
and no library is imported.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..tracing.trees import leaf_tensors
from .config import Tree

RUNTIME = ("_attn_implementation", "_experts_implementation")  # how a model runs: chosen when it is loaded, not kept


def configured(model: nn.Module) -> bool:
    """Whether a model is saved with a configuration that its class is built from; one that wraps such a model (an adapter) takes that beside it."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        ways = hasattr(type(model), "from_config")
    else:
        ways = hasattr(config, "to_dict") and hasattr(type(config), "from_dict") and _takes_one(type(model))
    return ways and callable(getattr(type(model), "save_pretrained", None)) and callable(getattr(type(model), "from_pretrained", None))


def _takes_one(kind: type[nn.Module]) -> bool:
    """Whether a class is built from one argument, and needs no other."""
    try:
        arguments = list(inspect.signature(kind.__init__).parameters.values())[1:]
    except (TypeError, ValueError):
        return True
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return sum(argument.kind in places and argument.default is inspect.Parameter.empty for argument in arguments) <= 1


def tree_of(model: nn.Module) -> Tree:
    """What the configuration of a model says, as plain data of its own."""
    config: Any = model.config
    return copy.deepcopy(dict(config) if isinstance(config, Mapping) else config.to_dict())


def builder(model: nn.Module, bare: bool = False) -> Callable[[Tree], nn.Module]:
    """The class, from a configuration: on the meta device, or (``bare``) with everything but the weights."""
    kind: Any = type(model)
    config = model.config

    def build(tree: Tree) -> nn.Module:
        with quiet(), torch.random.fork_rng(devices=[]), _Unfilled() if bare else torch.device("meta"):
            if isinstance(config, Mapping):
                return kind.from_config(tree)
            return kind(configuration(config, tree))

    return build


def unfilled(model: nn.Module) -> nn.Module:
    """The class of a model built again, its weights on the meta device, its tables (positions, scales) computed."""
    return builder(model, bare=True)(tree_of(model))


def loaded(model: nn.Module, tree: Tree) -> nn.Module:
    """The class built from a configuration, in evaluation mode, with the very weights of ``model``."""
    kind: Any = type(model)
    again = builder(model, bare=True)(tree)
    device = next((tensor.device for *_, tensor in leaf_tensors(model)), None)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}  # a run may write into them
    state = model.state_dict() | {name: buffers[name] for name in buffers.keys() & model.state_dict().keys()}
    again.load_state_dict(state, assign=True)
    if any(tensor.is_meta for *_, tensor in leaf_tensors(again)):
        with quiet(), torch.random.fork_rng(devices=[]):
            again = kind.from_config(tree) if isinstance(model.config, Mapping) else kind(configuration(model.config, tree))
        again.load_state_dict(state, assign=True)
    return again.to(device).eval()


def configuration(config: Any, tree: Tree) -> Any:
    """An object of the same class as ``config`` that says what ``tree`` says."""
    other = type(config).from_dict(copy.deepcopy(tree))
    for key in RUNTIME:
        if hasattr(config, key):
            setattr(other, key, getattr(config, key))
    return other


class _Unfilled(TorchFunctionMode):
    """Weights are made without memory, and what is computed (tables of positions, scales) with: layers make them by ``torch.empty``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a library says while a model is built on trial, or without weights, is not for the user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
