"""Queries within their group: where several share a key and a value, so many of each group go, and keys and values stay.

A unit is the same place in every group (the first query of each, the second, …), since all groups keep equally many.

>>> import torch
>>> from ...coupling.groups import couple
>>> from ...tracing.trace import trace
>>> class Grouped(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.q, self.k, self.v, self.o = (torch.nn.Linear(8, size) for size in (24, 8, 8, 8))
...         self.o = torch.nn.Linear(24, 8)
...     def forward(self, x):
...         q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
...         k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2).repeat_interleave(3, 1) for part in (self.k, self.v))
...         return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
>>> groups = couple(trace(Grouped(), torch.zeros(1, 5, 8), apart=True))
>>> [groups.groups[index].size for index in query_heads(groups)]
[3]
"""

from __future__ import annotations

import numpy as np

from ...coupling.groups import Groups
from ...granularity.heads import heads, of_one_key
from .kind import of_groups


@of_groups("query_heads", "queries within the group that shares a key: 32 for 8 keys become 24 for 8", apart=True)
def query_heads(groups: Groups) -> set[int]:
    if not groups.graph.labels.apart:
        return set()
    copies = [np.arange(start, end) for start, end in groups.graph.labels.repeated]
    repeated = np.unique(groups.owner[groups.root[np.concatenate(copies)]]) if copies else ()
    return of_one_key(groups) | (heads(groups) & {int(index) for index in repeated if index >= 0})
