"""Attention heads; where several queries share a key, such a set of queries is one unit (:mod:`graphprune.granularity.heads`)."""

from __future__ import annotations

from ...coupling.groups import Groups
from ...granularity import heads as attention
from .kind import of_groups


@of_groups("heads", "attention heads: queries with the keys and values that they share")
def heads(groups: Groups) -> set[int]:
    return attention.heads(groups)
