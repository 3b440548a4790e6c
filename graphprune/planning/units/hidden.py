"""The residual stream: units of what is added to a value that it was itself made from, by more than arithmetic entry by entry (an activation that is written
as a sum, ``x + 0.044715 * x**3``, is no branch).

>>> import torch
>>> from ...coupling.groups import couple
>>> from ...tracing.trace import trace
>>> class Net(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.stem, self.wide, self.back, self.out = (torch.nn.Linear(*sizes) for sizes in ((3, 4), (4, 8), (8, 4), (4, 2)))
...     def forward(self, x):
...         x = self.stem(x)
...         return self.out(x + self.back(self.wide(x).relu()))
>>> groups = couple(trace(Net(), torch.zeros(1, 3)))
>>> [groups.groups[index].size for index in hidden(groups)]
[4]
"""

from __future__ import annotations

from collections.abc import Mapping

from ...coupling.groups import Groups
from ...operations.notation import Value
from ...tracing.graph import Graph
from ...tracing.trees import tensors
from .kind import of_groups


@of_groups("hidden", "the residual stream: what branches read and add to, in all layers at once")
def hidden(groups: Groups) -> set[int]:
    graph = groups.graph
    indices: set[int] = set()
    for node in graph.nodes:
        if node.op.arithmetic != "add" or not node.outs:
            continue
        terms = [value for value in tensors((node.args, node.kwargs)) if value.shape == node.outs[0].shape]
        if len(terms) == 2 and any(made_from(graph, one, other) for one, other in (terms, terms[::-1])):
            indices |= {index for dim in range(len(node.outs[0].shape)) for index in groups.along(node.outs[0], dim)}
    return indices


def made_from(graph: Graph, value: Value, origin: Value) -> bool:
    """Whether a value was made from another, which was there before it, by more than moves and arithmetic entry by entry.

    Only what lies between the two is looked at.
    """
    if origin.node >= value.node or origin.leaf:
        return False
    todo, seen = [(value, False)], set()
    while todo:
        now, branched = todo.pop()
        if now is origin:
            if branched:
                return True
        elif now.node > origin.node and (now.node, branched) not in seen:
            seen.add((now.node, branched))
            node = graph.nodes[now.node]
            branched = branched or not (node.is_pointwise or node.is_move)
            todo += [(argument, branched) for argument in _arguments(graph, now)]
    return False


def _arguments(graph: Graph, value: Value) -> list[Value]:
    node = graph.nodes[value.node]
    return list(tensors((node.args, node.kwargs)))


def recurrent(groups: Groups) -> Mapping[int, bool]:
    """Whether a weight of a group reads what it makes: both its axes are of the group."""
    recurrence = {}
    for group in groups:
        leaves = [name for name, _ in group.places]
        recurrence[group.index] = len(set(leaves)) < len(leaves)
    return recurrence
