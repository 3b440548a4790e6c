"""Blocks that are gone leave no hole: :func:`closed` is the model with the lists of its blocks closed up and its blocks counted anew.

A plan that removes blocks leaves a :class:`~graphprune.cutting.passthrough.Passthrough` in the place of each, so that every name stays as it was. Outside of
graphprune a list of blocks is as long as a configuration says, and has no such places.

>>> from graphprune.cutting.passthrough import PassingOver, Passthrough
>>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
>>> net[1] = Passthrough(net[1], 0)
>>> small, lists = closed(net)
>>> list(dict(small.named_children())), lists
(['0', '1'], {'': (3, (0, 2))})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..cutting.passthrough import PassingOver, Passthrough
from ..tracing.copies import duplicate
from ..tracing.trees import leaf_tensors

Lists = dict[str, tuple[int, tuple[int, ...]]]


def closed(model: nn.Module) -> tuple[nn.Module, Lists]:
    """A copy that shares the tensors of ``model``, and the lists that were closed up: how long each was, and which places stay.

    Attributes of blocks that say which block it is (in every block of the list its own number) say the new one. Where nothing is gone, the model itself.
    """
    if not any(isinstance(module, Passthrough) for module in model.modules()):
        return model, {}
    twin = duplicate(model, {id(tensor): tensor for *_, tensor in leaf_tensors(model)})
    lists: Lists = {}
    for path, holder in twin.named_modules():
        gone = [isinstance(child, Passthrough) for child in holder._modules.values()]
        if any(gone) and list(holder._modules) == [str(i) for i in range(len(gone))]:
            kept = tuple(i for i, away in enumerate(gone) if not away)
            blocks = [holder._modules[str(i)] for i in kept]
            gone_blocks = {int(key): child for key, child in holder._modules.items() if isinstance(child, Passthrough)}
            for old, new, attributes in _numbers(kept, blocks, gone_blocks):
                for holds, key in attributes:
                    holds[key] = new if holds[key] == old else holds[key]
            holder._modules.clear()
            holder._modules.update({str(new): block for new, block in enumerate(blocks)})
            if type(holder) is PassingOver:
                holder.__class__ = nn.ModuleList  # pyright: ignore[reportAttributeAccessIssue]
            lists[path] = (len(gone), kept)
    return twin, lists


def before_closing(name: str, lists: Lists) -> str:
    """The name that a tensor of a model that was closed up has in the model as it is.

    >>> before_closing("layers.1.experts.1.weight", {"layers": (3, (0, 2)), "layers.1.experts": (4, (1, 3))})
    'layers.2.experts.3.weight'
    """
    for path in sorted(lists, key=len, reverse=True):
        prefix = f"{path}." if path else ""
        number, dot, rest = name[len(prefix) :].partition(".")
        if name.startswith(prefix) and number.isdigit() and int(number) < len(lists[path][1]):
            name = f"{prefix}{lists[path][1][int(number)]}{dot}{rest}"
    return name


def _numbers(kept: tuple[int, ...], blocks: list[Any], gone: Mapping[int, nn.Module]) -> Iterator[tuple[int, int, list[tuple[dict[Any, Any], str]]]]:
    """The attributes that say, in every block, which one it is: the old number, the new, and who holds them."""
    every = [{(path, key): module.__dict__ for path, module in block.named_modules() for key in _plain(module)} for block in blocks]
    counts = set.intersection(*(set(names) for names in every)) if every else set()
    counts = {name for name in counts if all(names[name][name[1]] == old for old, names in zip(kept, every, strict=True))}
    if len(kept) == 1:  # any number of one block may be its own by chance (groups=1): those that are gone have to agree
        agreed = set.intersection(*({key for key in _plain(block) if block.__dict__[key] == old} for old, block in gone.items()))
        counts = {name for name in counts if name[1] in agreed}
    for new, (old, names) in enumerate(zip(kept, every, strict=True)):
        yield old, new, [(names[name], name[1]) for name in counts]


def _plain(module: nn.Module) -> list[str]:
    return [key for key, value in module.__dict__.items() if type(value) is int]
