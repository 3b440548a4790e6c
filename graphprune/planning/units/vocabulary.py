"""Tokens: rows of the table that ids address, with their rows of what gives every token a logit (:mod:`graphprune.coupling.vocabulary` finds them).

>>> import torch
>>> from torch import nn
>>> from ...tracing.trace import trace
>>> graph = trace(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)), torch.zeros(1, 3, dtype=torch.long))
>>> [coupled(graph).groups[index].size for index in tokens(coupled(graph))]
[7]
"""

from __future__ import annotations

from ...coupling.groups import Groups
from ...coupling.vocabulary import coupled, vocabulary
from .kind import of_groups


@of_groups("vocabulary", "tokens by use: rows of the embedding and of the output head together; ids follow", role=False, coupled=coupled)
def tokens(groups: Groups) -> set[int]:
    words = vocabulary(groups.graph)
    return {index for name in words.tables for index in groups.along(groups.graph.leaves[name], 0)}
