"""Where a tensor of the run comes from: the parameter that it is, or a view of, and which of its axes are which of the parameter's.

>>> from .trace import trace
>>> graph = trace(torch.nn.Linear(3, 5), torch.zeros(2, 3))
>>> weight = graph.nodes[-1].weight
>>> leaf = source(graph.nodes, weight)
>>> leaf.leaf, weight.shape, axis_of(leaf, weight, 1)
('weight', (3, 5), 0)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..operations.notation import Value
from .node import Node

__all__ = ["axis_of", "source", "torch"]


def source(nodes: Sequence[Node], value: Value) -> Value | None:
    """The leaf that a value is, seen through movements alone; None where something is computed on the way."""
    while not value.leaf:
        node = nodes[value.node] if value.node >= 0 else None
        if node is None or not node.is_move or len(node.held) != 1:
            return None
        value = node.held[0]
    return value


def axis_of(leaf: Value, value: Value, axis: int) -> int | None:
    """The axis of the leaf whose labels stand along an axis of what was made of it; None where that is not one."""
    if value is leaf:
        return axis
    here = [f.ravel() for f in value.fields if f.shape[axis] > 1]
    if not here:
        alike = [a for a, size in enumerate(leaf.shape) if size == value.shape[axis] == 1]
        return alike[0] if len(alike) == 1 else None
    if len(here) > 1:
        return None
    axes = [a for f in leaf.fields for a in [int(np.argmax(f.shape))] if np.isin(here[0], f).all()]
    return axes[0] if len(axes) == 1 else None
