"""Experts of a mixture: what a router chooses a few of for every token. The router's row, and the expert's slice of every stack, are one unit.

Which axes the code chooses from is known from the run (:mod:`graphprune.tracing.choices`). To remove an expert is to give it a score of minus infinity: as
many as the router chooses stay.

>>> import torch
>>> from ...coupling.groups import couple
>>> from ...tracing.trace import trace
>>> class Mixture(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.router, self.experts = torch.nn.Linear(4, 6), torch.nn.Parameter(torch.randn(6, 4, 4))
...     def forward(self, x):
...         scores, at = self.router(x).topk(2)
...         return (scores.unsqueeze(-1) * torch.einsum("ti,tkio->tko", x, self.experts[at])).sum(1)
>>> groups = couple(trace(Mixture(), torch.zeros(5, 4)))
>>> [groups.groups[index].size for index in experts(groups)]
[6]
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from ...coupling.groups import Groups
from ...operations.labels import Array
from ...tracing.choices import least
from ...tracing.graph import Graph
from .kind import of_groups


@of_groups("experts", "experts of a mixture: a router's rows with all that belongs to each; as many as it chooses stay")
def experts(groups: Groups) -> set[int]:
    return set(least(groups, groups.graph.choices))


def beside(graph: Graph) -> list[tuple[Array, str]]:
    """Locks for what lies in one axis with experts (einsum puts them into the columns of one product): of a field over both, only one can be cut."""
    root = graph.labels.partition().parent
    chosen = {root[choice.labels].tobytes() for choice in graph.choices}
    fields: dict[bytes, list[Array]] = defaultdict(list)
    for joint in graph.labels.joints:
        if joint.slices is not None:
            fields[np.unique(root[joint.array]).tobytes()].append(joint.slices.ravel())
    locks = []
    for slices in fields.values():
        if any(root[each].tobytes() in chosen for each in slices):
            locks += [(each, "it lies in one axis with the experts") for each in slices if root[each].tobytes() not in chosen]
    return locks


def stacked(groups: Groups) -> set[str]:
    """The names of the tensors that hold a slice for each expert, routers included, whether experts may go or not."""
    labels = [groups.root[choice.labels] for choice in groups.graph.choices]
    if not labels:
        return set()
    every = np.unique(np.concatenate(labels))
    return {name for name, leaf in groups.graph.leaves.items() for entries in leaf.fields if np.isin(groups.root[entries.flat[0]], every)}
