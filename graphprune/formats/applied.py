"""A plan carried out by itself: :func:`apply`, which also guards what a model's own class would save."""

from __future__ import annotations

from torch import nn

from ..cutting.apply import apply as cut
from ..cutting.plan import Plan
from .huggingface import guarded


def apply(model: nn.Module, plan: Plan, inplace: bool = False) -> nn.Module:
    """The smaller model, of the same class; ``model`` is untouched unless ``inplace``.

    Raises :class:`~graphprune.errors.BadPlan` when the plan was made for other shapes. What fails in place leaves the model as it was. A model with a
    configuration that its class is built from keeps it: its ``save_pretrained`` raises :class:`~graphprune.errors.BadConfig` (``shrink`` lets it follow).

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> apply(net, Plan({"0.weight": {0: [0, 1]}, "0.bias": {0: [0, 1]}, "2.weight": {1: [0, 1]}}, {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (2, 8)}))[0]
    Linear(in_features=4, out_features=2, bias=True)
    """
    return guarded(cut(model, plan, inplace))
