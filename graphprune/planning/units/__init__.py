"""Kinds of units, by what they are to a user (hidden, heads, mlp, experts, layers …; channels for all others), found from the graph, whatever names it has.

A kind is one file: a function that finds its groups (or its modules), entered in the catalogue with one line. :func:`roles` says for every group what it is.
"""

from __future__ import annotations

from . import expert_mlp, experts, head_dim, heads, hidden, layers, mlp, query_heads, vocabulary
from .kind import CHANNELS, Kind, kind, roles

__all__ = ["CHANNELS", "Kind", "expert_mlp", "experts", "head_dim", "heads", "hidden", "kind", "layers", "mlp", "query_heads", "roles", "vocabulary"]
