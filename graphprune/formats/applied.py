# pyright: strict, reportUnnecessaryIsInstance=false
"""A plan carried out by itself: :func:`apply`, which also guards what a model's own class would save."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn

from ..cutting.apply import apply as cut
from ..cutting.compose import so_far
from ..cutting.plan import Plan, note_plan
from ..cutting.undo import undone
from ..errors import BadModel, BadPlan, no_module
from ..planning.request import flag
from ..tracing.trees import check_scope
from .huggingface import guarded


def apply(model: nn.Module, plan: Plan, inplace: bool = False) -> nn.Module:
    """The smaller model, of the same class; ``model`` is untouched unless ``inplace``.

    The result carries the plan (:func:`graphprune.plan_of`), relative to the original where the model was cut before. Raises
    :class:`~graphprune.errors.BadPlan` when the plan was made for other shapes. What fails in place leaves the model as it was. A model with a
    configuration that its class is built from keeps it: its ``save_pretrained`` raises :class:`~graphprune.errors.BadConfig` (``shrink`` lets it follow).

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> apply(net, Plan({"0.weight": {0: [0, 1]}, "0.bias": {0: [0, 1]}, "2.weight": {1: [0, 1]}}, {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (2, 8)}))[0]
    Linear(in_features=4, out_features=2, bias=True)
    """
    check_scope()
    if not isinstance(model, nn.Module):
        raise BadModel(no_module(model))
    if not isinstance(plan, Plan):
        raise BadPlan(f"the plan is a {type(plan).__name__}; give what graphprune.plan(...) returns, or graphprune.Plan.from_json(text)")
    with undone(model, plan.edits) if flag("inplace", inplace) else nullcontext():
        whole = so_far(model, plan)  # before the model itself is cut
        small = guarded(cut(model, plan, inplace))
        note_plan(small, whole)
    return small
