"""Kinds of units, by what they are to a user: hidden, heads, mlp, layers, and channels for all others; found from the graph, whatever the model calls them.

A kind is one file: a function that finds its groups (or its modules), entered in the catalogue with one line. :func:`roles` says for every group what it is.
"""

from __future__ import annotations

from . import heads, hidden, layers, mlp
from .kind import CHANNELS, Kind, kind, roles

__all__ = ["CHANNELS", "Kind", "heads", "hidden", "kind", "layers", "mlp", "roles"]
