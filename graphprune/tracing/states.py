"""What a model returns beside its logits and makes them of: states, which are as wide as the model's configuration says.

Every result that a caller can read keeps its size, or a head behind the model would break. One kind is different: a result that names its parts
(a dataclass), among them ``logits``, of a model with a configuration, by which whoever reads a state knows how wide it is. Such a model returns its states so
that a caller can hand them back to it, or look at them; a smaller model of the same family, with a smaller configuration, returns narrower ones. So these
follow what is cut: a state that the logits are computed from, or one that the model takes back under the name of an argument in its next call. A note of
the plan names them, and ``outputs=`` keeps them. What else a result holds (the logits, boxes beside them, anything in a tuple or a plain dictionary)
keeps its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

from ..operations.labels import Array
from ..operations.notation import Value
from .node import Node
from .outputs import Item, without
from .symbols import configures

LOGITS = "logits"


def states_of(
    model: nn.Module, result: Any, chosen: Sequence[Item], values: Sequence[Value], nodes: Sequence[Node], example: tuple[tuple[Any, ...], Mapping[str, Any]]
) -> frozenset[str]:
    """The parts of a result, by name, that are states: see above. ``values`` are those of the tensors among ``chosen``."""
    if isinstance(result, type) or not is_dataclass(result):
        return frozenset()
    by_name: dict[str, list[Value]] = {}
    for path, value in zip([path for path, item in chosen if isinstance(item, torch.Tensor)], values, strict=True):
        by_name.setdefault(path.partition(".")[0], []).append(value)
    if len(by_name.get(LOGITS, ())) != 1:
        return frozenset()
    behind = _behind(by_name.pop(LOGITS)[0], nodes)
    returned = without(model, *example)
    return frozenset(name for name, states in by_name.items() if name in returned or all(id(value) in behind for value in states))


def stated(model: nn.Module, symbols: Mapping[tuple[Any, ...], int]) -> frozenset[int]:
    """The whole numbers of the model's configuration, among which are the widths of its states."""
    return frozenset(size for path, size in symbols.items() if path[0] == "" and len(path) > 2 and configures(getattr(model, path[1], None)))


def unstated(value: Value, sizes: frozenset[int]) -> list[Array]:
    """The labels of a state that run along an axis of which the configuration says nothing."""
    return [field for field in value.fields if any(size > 1 and value.shape[dim] not in sizes for dim, size in enumerate(field.shape))]


def _behind(value: Value, nodes: Sequence[Node]) -> set[int]:
    """The ids of the values that a value is computed from."""
    behind: set[int] = set()
    todo = [value]
    while todo:
        number = todo.pop().node
        for earlier in nodes[number].held if 0 <= number < len(nodes) else ():
            if id(earlier) not in behind:
                behind.add(id(earlier))
                todo.append(earlier)
    return behind
