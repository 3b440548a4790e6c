"""The width of heads: entries by which queries are compared with keys (in pairs, where positions rotate them), and entries of values. Heads stay.

The two are groups of their own where nothing else ties them: in most models values may keep another width than queries and keys.

>>> import torch
>>> from ...coupling.groups import couple
>>> from ...tracing.trace import trace
>>> class Layer(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in "qkvo")
...     def forward(self, x):
...         q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
...         return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
>>> graph = trace(Layer(), torch.zeros(1, 5, 8))
>>> groups = couple(graph, locks=tuple(whole_heads(graph)))
>>> [groups.groups[index].size for index in head_dim(groups)]
[4, 4]
"""

from __future__ import annotations

from ...coupling.groups import Groups
from ...granularity.heads import entries, inside, whole_heads
from .kind import of_groups


@of_groups(
    "head_dim", "entries of every head: those of queries and keys (rotated ones in pairs), and those of values", role=False, locks=whole_heads, counts=entries
)
def head_dim(groups: Groups) -> set[int]:
    return inside(groups)
