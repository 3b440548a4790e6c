"""What a user speaks of by name, pattern, type or predicate: tensors to keep, and groups with a ratio or a width of their own.

>>> named(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "0")
['0.weight', '0.bias']
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from .coupling.groups import Group, Groups
from .coupling.links import Link, links
from .errors import BadRatio, UnknownName
from .options import whole
from .select import check_ratio
from .tracing.trees import leaf_tensors
from .wording import brief


def kept(model: nn.Module, keep: Any) -> list[str]:
    """The tensors that ``keep`` names; raises :class:`~graphprune.errors.UnknownName` for a type of module of which there is none."""
    for kind in [keep] if isinstance(keep, type) else keep if isinstance(keep, list | tuple | set) else ():
        if isinstance(kind, type) and not any(isinstance(module, kind) for module in model.modules()):
            there = sorted({type(module).__name__ for name, module in model.named_modules() if name})
            raise UnknownName(f"no module of this model is a {kind.__name__}; there are {', '.join(there[:12])}{' …' if len(there) > 12 else ''}")
    return named(model, keep)


def named(model: nn.Module, keep: Any) -> list[str]:
    """The tensors that ``keep`` speaks of: names, patterns, module types, modules or predicates."""
    if isinstance(keep, str | type) or callable(keep):
        wanted = [keep]
    elif isinstance(keep, Iterable):
        wanted = list(keep)
    else:
        raise UnknownName(f"{keep!r} is neither a name, a pattern, a module type nor a predicate, nor a list of these")
    if not wanted:
        return []
    modules, tensors = dict(model.named_modules()), [name for name, *_ in leaf_tensors(model)]
    found: list[str] = []
    for item in wanted:
        hits = _hits(item, modules, tensors)
        found += [leaf for leaf in tensors for hit in hits if not hit or leaf == hit or leaf.startswith(hit + ".")]
    return found


def _hits(item: Any, modules: dict[str, nn.Module], tensors: list[str]) -> list[str]:
    """The modules and tensors that one key fits; raises :class:`~graphprune.errors.UnknownName` with the nearest names for a text that fits none."""
    if isinstance(item, str):
        return _fitting(item, [name for name in (*modules, *tensors) if name])
    if isinstance(item, type):
        return [name for name, module in modules.items() if isinstance(module, item)]
    if isinstance(item, nn.Module):
        hits = [name for name, module in modules.items() if module is item]
        if not hits:
            raise UnknownName(f"{brief(item)} is a module, but none of this model; give one of model.modules(), or its name")
        return hits
    if isinstance(item, Callable):
        _check_predicate(item)
        return [name for name, module in modules.items() if item(name, module)]
    raise UnknownName(f"{brief(item)} is neither a name, a pattern, a module type nor a predicate")


def _fitting(text: str, names: list[str]) -> list[str]:
    """The names that are this one, or fit this pattern."""
    hits = [name for name in names if name == text or fnmatch.fnmatchcase(name, text)]
    if not hits:
        near = difflib.get_close_matches(text, names, 3)
        hint = f"the nearest are {', '.join(near)}" if near else "model.named_modules() lists what there is"
        raise UnknownName(f"{text!r} fits no module or parameter; {hint}")
    return hits


def _check_predicate(function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind("name", nn.Identity())
    except TypeError as error:
        raise UnknownName(f"{getattr(function, '__name__', function)!r} is no predicate (name, module) -> bool: {error}") from None
    except ValueError:  # some built-in functions have no signature
        pass


class Makers:
    """Which tensors make the units of every group, so that a name means the groups that its module puts out.

    A weight makes what its outputs are, wherever that axis lies in it; a norm or a bias passes on what others make.
    """

    def __init__(self, groups: Groups, model: nn.Module) -> None:
        self.groups, self.model = groups, model

    @cached_property
    def links(self) -> list[list[Link]]:
        return links(self.groups)

    @cached_property
    def made(self) -> list[set[str]]:
        """For every group the tensors that make its units: weights, and what else there is where no weight does."""
        found = []
        for group, mine in zip(self.groups, self.links, strict=True):
            makers = {link.leaf for link in mine if link.role == "produces"}
            weights = {leaf for leaf in makers if len(self.groups.graph.leaves[leaf].shape) > 1}
            found.append(weights or makers or {name for name, axis in group.places if axis == 0})
        return found

    def of(self, key: Any) -> list[int]:
        """The groups that a key speaks of: those that only the tensors it fits make; where there are none, those that these make or pass on among others.

        So ``"*.mlp"`` means the hidden units of the MLPs, and ``"*.mlp.down_proj"`` the stream that it adds to.
        """
        if isinstance(key, int) and not isinstance(key, bool):
            if not 0 <= key < len(self.groups):
                raise UnknownName(f"there is no group {key}; they are numbered from 0 to {len(self.groups) - 1}")
            return [key]
        hits = set(named(self.model, [key]))
        alone = [group.index for group in self.groups if self.made[group.index] <= hits]
        return alone or [group.index for group in self.groups if self._touched(group, hits)]

    def _touched(self, group: Group, hits: set[str]) -> bool:
        return bool(self.made[group.index] & hits) or any(link.leaf in hits for link in self.links[group.index] if link.role in ("produces", "passes"))

    def units(self, group: Group, key: Any, width: int) -> int:
        """How many units of a group leave ``width`` outputs of what a key fits; raises :class:`~graphprune.errors.BadRatio` with the nearest widths that do."""
        hits = None if isinstance(key, int) else set(named(self.model, [key]))
        places = [link.units for link in self.links[group.index] if link.role == "produces" and (hits is None or link.leaf in hits)]
        along = np.asarray(max(places or list(group.places.values()), key=len))
        fixed, each = int((along < 0).sum()), int((along >= 0).sum()) / group.size
        if not fixed + each <= width <= len(along):
            raise BadRatio(f"the width of {key!r} is {width}; {group.name} puts out {len(along)} and keeps at least {fixed + each:g}")
        units = (width - fixed) / each
        if units != int(units):
            below, above = (int(fixed + each * (int(units) + step)) for step in (0, 1))
            raise BadRatio(f"the width of {key!r} is {width}, but the outputs of {group.name} go by {each:g}: the nearest widths are {below} and {above}")
        return int(units)


def overrides(
    groups: Groups, model: nn.Module, ratios: Mapping[Any, float] | Callable[..., Any] | None, to: Mapping[Any, int] | None = None
) -> dict[int, float]:
    """The ratio of every group that has one of its own, or a width; ``ratios`` may also be a function of the groups that returns just this."""
    own = _computed(groups, ratios) if callable(ratios) else {}
    makers = Makers(groups, model)
    for key, ratio in ratios.items() if isinstance(ratios, Mapping) else ():
        check_ratio(ratio, f"the ratio of {key!r}")
        own |= dict.fromkeys(makers.of(key), ratio)
    for key, width in (to or {}).items():
        own |= {index: 1 - makers.units(groups.groups[index], key, width) / groups.groups[index].size for index in makers.of(key)}
    return own


def _computed(groups: Groups, ratios: Callable[..., Any]) -> dict[int, float]:
    """What a function says of the groups; raises :class:`~graphprune.errors.BadRatio` or :class:`~graphprune.errors.UnknownName` for anything else."""
    try:
        inspect.signature(ratios).bind(groups)
        own = dict(ratios(groups))
    except (TypeError, ValueError) as error:
        raise BadRatio(f"ratios is a function (groups) -> {{group.index: ratio}}; it cannot be called so, or returns something else: {error}") from error
    for index, ratio in own.items():
        check_ratio(ratio, f"the ratio of group {index!r}")
        if not whole(index) or not 0 <= index < len(groups):
            raise UnknownName(f"there is no group {index!r}; they are numbered from 0 to {len(groups) - 1}")
    return own


def by_tensor(model: nn.Module, ratios: Mapping[Any, float] | Callable[..., Any] | None) -> dict[str, float]:
    """The ratios of single tensors."""
    keys = ratios if isinstance(ratios, Mapping) else {}
    return {name: check_ratio(ratio, f"the ratio of {key!r}") for key, ratio in keys.items() for name in named(model, [key])}
