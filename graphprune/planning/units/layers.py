"""Whole residual blocks, as language models count their layers (:mod:`graphprune.planning.depth` plans them)."""

from __future__ import annotations

from ...catalogue import enter

enter("granularity", "layers", "whole residual blocks, as the layers of a language model are counted: the same as block")
