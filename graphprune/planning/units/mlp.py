"""Hidden units of multilayer perceptrons: made by matrices, summed over by matrices, and neither stream, heads nor a state.

>>> import torch
>>> from ...coupling.groups import couple
>>> from ...tracing.trace import trace
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> mlp(couple(trace(net, torch.zeros(1, 3))))
{0}
"""

from __future__ import annotations

from ...coupling.groups import Groups
from ...coupling.links import links
from ...granularity.heads import attended
from ...tracing.choices import least
from .hidden import hidden, recurrent
from .kind import of_groups

MATRIX = 2  # axes of a matrix


@of_groups("mlp", "hidden units of MLPs, gated ones with their gates")
def mlp(groups: Groups) -> set[int]:
    leaves, state = groups.graph.leaves, recurrent(groups)
    others = {*hidden(groups), *attended(groups), *least(groups, groups.graph.choices)}
    indices = set()
    for group, group_links in zip(groups, links(groups), strict=True):
        weights = [(link.role, len(leaves[link.leaf].shape)) for link in group_links if len(leaves[link.leaf].shape) >= MATRIX]
        both = {role for role, _ in weights} >= {"produces", "consumes"}
        if both and all(axes == MATRIX for _, axes in weights) and not state[group.index] and group.index not in others:
            indices.add(group.index)
    return indices
