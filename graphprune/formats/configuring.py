"""Other numbers in the configuration of a model: :func:`configure`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from .config import Path, Tree
from .rebuilt import configuration, tree_of


def configure(model: nn.Module, changes: Mapping[Path, Any]) -> None:
    """Put other numbers into the configuration of a model, and of its modules; objects that others may hold are left as they are."""
    if not changes:
        return
    old: Any = model.config
    if isinstance(old, Mapping):
        top: dict[str, Any] = {}
        for path, value in changes.items():
            top[path[0]] = _with({**top}.get(path[0], old[path[0]]), path[1:], value)
        configurable: Any = model  # of a library whose configurations are mappings
        configurable.register_to_config(**top)
        return
    tree = tree_of(model)
    for path, value in changes.items():
        tree = _with(tree, path, value)
    derived = configuration(old, tree).to_dict()
    memo: dict[int, Any] = {}
    new = copy.deepcopy(old, memo)
    _write(new, old.to_dict(), derived)
    for module in model.modules():
        for key, value in module.__dict__.items():
            if id(value) in memo and type(value).__module__ == type(memo[id(value)]).__module__ and hasattr(value, "to_dict"):
                module.__dict__[key] = memo[id(value)]


def _with(tree: Any, path: Path, value: Any) -> Any:
    """A nest with another value at a place."""
    if not path:
        return list(value) if isinstance(value, tuple) else value
    twin = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    inside = twin.get(path[0]) if isinstance(twin, dict) else twin[path[0]]
    twin[path[0]] = _with(inside, path[1:], value)
    return type(tree)(twin) if isinstance(tree, tuple) else twin


def _write(config: Any, before: Tree, after: Tree) -> None:
    """Let a configuration object say what another says."""
    for key, value in after.items():
        inside = getattr(config, key, None)
        if hasattr(inside, "to_dict") and isinstance(value, dict):
            _write(inside, before.get(key, {}), value)
        elif key not in before or before[key] != value:
            setattr(config, key, value)
