"""What a user speaks of by name, pattern, type or predicate: tensors to keep, and groups with a ratio of their own.

>>> named(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "0")
['0.weight', '0.bias']
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .coupling.groups import Groups
from .errors import UnknownName
from .select import check_ratio
from .tracing.trees import leaf_tensors


def named(model: nn.Module, keep: Any) -> list[str]:
    """The tensors that ``keep`` speaks of: names, patterns, module types or predicates."""
    wanted = [keep] if isinstance(keep, str | type) or callable(keep) else list(keep)
    if not wanted:
        return []
    modules, leaves_ = dict(model.named_modules()), [name for name, *_ in leaf_tensors(model)]
    found: list[str] = []
    for item in wanted:
        if isinstance(item, str):
            hits = [n for n in (*modules, *leaves_) if n and (n == item or fnmatch.fnmatchcase(n, item))]
            if not hits:
                near = difflib.get_close_matches(item, [*modules, *leaves_], 3)
                hint = f"the nearest are {', '.join(near)}" if near else "model.named_modules() lists what there is"
                raise UnknownName(f"{item!r} fits no module or parameter; {hint}")
        elif isinstance(item, type):
            hits = [name for name, module in modules.items() if isinstance(module, item)]
        elif isinstance(item, nn.Module):
            hits = [name for name, module in modules.items() if module is item]
        elif isinstance(item, Callable):
            hits = [name for name, module in modules.items() if item(name, module)]
        else:
            raise UnknownName(f"{item!r} is neither a name, a pattern, a module type nor a predicate")
        found += [leaf for leaf in leaves_ for hit in hits if not hit or leaf == hit or leaf.startswith(hit + ".")]
    return found


def overrides(groups: Groups, model: nn.Module, ratios: Mapping[Any, float] | Callable | None) -> dict[int, float]:
    """The ratio of every group that has one of its own; ``ratios`` may also be a function of the groups that returns just this."""
    if callable(ratios):
        return dict(ratios(groups))
    own: dict[int, float] = {}
    for key, ratio in (ratios or {}).items():
        check_ratio(ratio, f"the ratio of {key!r}")
        if isinstance(key, int):
            own[key] = ratio
            continue
        mine = set(named(model, [key]))
        for group in groups:
            if any(name in mine and axis == 0 for name, axis in group.places):
                own[group.index] = ratio
    return own


def by_tensor(model: nn.Module, ratios: Mapping[Any, float] | None) -> dict[str, float]:
    """The ratios of single tensors."""
    return {name: check_ratio(ratio, f"the ratio of {key!r}") for key, ratio in (ratios or {}).items() for name in named(model, [key])}
