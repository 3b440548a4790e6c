"""What matters: every score by its literature name, and :func:`score` that computes one for all groups.

>>> from graphprune import couple, trace
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> groups = couple(trace(net, torch.zeros(1, 4)))
>>> [found.shape for found in score(groups, net, "l1")]
[torch.Size([8])]
>>> [found.shape for found in score(groups, net, l1.with_(reduce="mean", normalise="max"))]
[torch.Size([8])]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..coupling.groups import Groups
from ..errors import UnknownName, warn
from ..tracing.trees import leaf_tensors
from .activations import activation, apoz, entropy, flap, wanda_sp
from .data import undisturbed
from .expansion import fisher, obd, taylor
from .fold import bn_scale, synaptic
from .gates import group_fisher, mask_fisher, taylor_gate
from .maps import chip, hrank
from .norm import filter_norm, group_norm, l1, l2, lamp, linf, product
from .normalise import kind, normalise
from .others import ensemble, random
from .reconstruct import lasso, leverage, obs, pivoted_qr, thinet
from .registry import SCORES, OnData, Score, accepts, checked, named, on, register
from .similar import fpgm, redundancy
from .start import grasp, snip, synflow
from .task import Scores

Criterion = str | Score | OnData | Callable[..., Scores]

__all__ = [
    "Criterion", "OnData", "SCORES", "Score", "Scores", "activation", "apoz", "bn_scale", "chip", "ensemble", "entropy", "filter_norm", "fisher", "flap",
    "fpgm", "grasp", "group_fisher", "group_norm", "hrank", "kind", "l1", "l2", "lamp", "lasso", "leverage", "linf", "mask_fisher", "named", "normalise", "obd",
    "obs", "on", "pivoted_qr", "product", "random", "redundancy", "register", "score",
    "snip", "synaptic", "synflow", "taylor", "taylor_gate", "thinet", "wanda_sp",
]  # fmt: skip


def __getattr__(name: str) -> Score:
    """Scores that are registered elsewhere (``effect`` stands beside the repairs, whose activations it reads)."""
    if name in SCORES:
        return SCORES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def valueless(model: torch.nn.Module, groups: Groups) -> bool:
    """Whether any weight along the units lies on the meta device."""
    names = {name for group in groups for name, _ in group.places}
    return any(tensor.is_meta for name, _, _, tensor in leaf_tensors(model) if name in names)


def score(
    groups: Groups,
    model: torch.nn.Module,
    criterion: Criterion = "l2",
    batches: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    **options: Any,
) -> Scores:
    """A float64 tensor of shape (units,) for each group; larger means more important.

    ``criterion`` is a name of :func:`graphprune.available`, a :class:`Score` such as ``scores.l2.with_(reduce="mean")``,
    or any function ``(groups, model, batches) -> list of tensors``. ``batches`` is any iterable (a DataLoader, a list),
    ``loss`` a function ``(output, labels)`` or ``(model, batch)``; the model, its ``.grad``, its mode and the random state
    are left as they were (a function of your own gets the model itself, in its own mode).
    Raises :class:`~graphprune.errors.UnknownName`, :class:`~graphprune.errors.NeedsBatches`,
    :class:`~graphprune.errors.BadLoss` or :class:`~graphprune.errors.BadScore`.
    """
    if isinstance(criterion, str):
        criterion = named(criterion)
    if isinstance(criterion, Score):
        if criterion.name != random.name and valueless(model, groups):
            warn(
                f"the model lies on the meta device and has no values for the score {criterion.name!r}: which units stay is drawn at random, only widths mean "
                "something; give a function (groups, model, batches) -> tensors that reads the weights from where they are"
            )
            return random(groups, model, seed=0)
        return criterion(groups, model, batches, loss, **options)
    if not callable(criterion):
        raise UnknownName(f"criterion is {criterion!r}; it is a name, a score, or a function (groups, model, batches) -> tensors")
    wanted = ", ".join(["groups", "model", "batches", *(f"{name}=" for name in options)])
    accepts(criterion, f"({wanted})", groups, model, batches, **options)
    with undisturbed(model, seed=None):
        values = criterion(groups, model, batches, **options)
    name = getattr(criterion, "__name__", type(criterion).__name__)
    return [tensor.detach().double().cpu() for tensor in checked(groups, model, values, name)]
