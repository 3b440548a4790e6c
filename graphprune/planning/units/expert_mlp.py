"""Hidden units of experts: those of a mixture that lie along another axis of the tensors that hold a slice for each expert, or inside a module of its list.

>>> import torch
>>> from ...coupling.groups import couple
>>> from ...tracing.trace import trace
>>> class Mixture(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.router = torch.nn.Linear(4, 6)
...         self.up, self.down = torch.nn.Parameter(torch.randn(6, 4, 8)), torch.nn.Parameter(torch.randn(6, 8, 4))
...     def forward(self, x):
...         scores, at = self.router(x).topk(2)
...         inner = torch.einsum("ti,tkio->tko", x, self.up[at]).relu()
...         return (scores.unsqueeze(-1) * torch.einsum("tki,tkio->tko", inner, self.down[at])).sum(1)
>>> groups = couple(trace(Mixture(), torch.zeros(5, 4)))
>>> [groups.groups[index].size for index in expert_mlp(groups)]
[8]
"""

from __future__ import annotations

from ...coupling.groups import Groups
from ...granularity.heads import attended
from .experts import experts, stacked
from .hidden import hidden
from .kind import of_groups

STACK = 3  # axes of a stack of matrices


@of_groups("expert_mlp", "hidden units of experts, the same in all experts that share a tensor")
def expert_mlp(groups: Groups) -> set[int]:
    return _of_stacks(groups) | _of_lists(groups)


def _of_lists(groups: Groups) -> set[int]:
    """Groups that lie inside of one module of a list of experts."""
    lists = [path.split(".") for mixture in groups.graph.mixtures for path in mixture.lists]
    inside = set()
    for group in groups if lists else ():
        names = [name.split(".") for name, _ in group.places]
        if any(all(name[: len(path)] == path and name[len(path)] == names[0][len(path)] for name in names) for path in lists):
            inside.add(group.index)
    return inside - ({*hidden(groups), *attended(groups)} if inside else set())


def _of_stacks(groups: Groups) -> set[int]:
    stacks = {name for name in stacked(groups) if len(groups.graph.leaves[name].shape) >= STACK}
    others = {*experts(groups), *hidden(groups), *attended(groups)} if stacks else set()
    between = {group.index for group in groups if len({name for name, _ in group.places} & stacks) > 1}  # made by one, read by another
    return between - others
