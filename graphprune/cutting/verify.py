"""Before and after: which models can be cut at all, and whether the cut one computes what the zeroed original computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import BadInput, BadModel, NotEqual
from ..tracing.trace import NOT_RUN, Graph, shadow
from ..tracing.trees import modules_of, tensors
from ..tracing.unused import same_dice
from .plan import Plan
from .zeroed import zeroed


def check(graph: Graph, model: nn.Module, small: nn.Module, plan: Plan, tolerance: float | None = None) -> float:
    """The largest relative difference between the cut model and the zeroed original; raises NotEqual when too large."""
    args, kwargs = graph.example
    modes = [(module, module.training) for module in small.modules()]
    try:
        with torch.no_grad():
            small.eval()
            with same_dice():
                found = list(tensors(small(*args, **kwargs), torch.Tensor))
            with same_dice():
                wanted = zeroed(model, plan, graph)(*args, **kwargs)
    except Exception as error:
        runs_whole(graph, model)
        raise NotEqual(f"the cut model does not run on the example: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    worst = 0.0
    for mine, theirs in zip(found, wanted, strict=True):
        if mine.shape != theirs.shape:
            raise NotEqual(f"an output has shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}")
        if mine.is_floating_point() and mine.numel() and not mine.is_meta:
            finite = torch.isfinite(theirs)
            if not torch.equal(torch.isfinite(mine), finite):
                raise NotEqual("the cut model and the zeroed original are not finite in the same places; verify=False skips this check")
            theirs = theirs[finite].double()
            gap = float((mine[finite].double() - theirs).abs().max()) / (float(theirs.abs().max()) or 1.0) if len(theirs) else 0.0
            limit = tolerance or {torch.float64: 1e-8, torch.float32: 1e-3}.get(mine.dtype, 5e-2)
            if not gap <= limit:
                raise NotEqual(f"the cut model differs from the zeroed original by {gap:.1e} (relative); verify=False skips this check")
            worst = max(worst, gap)
    return worst


def runs_whole(graph: Graph, model: nn.Module) -> None:
    """Raises :class:`~graphprune.errors.BadInput` if the model itself fails on the example (a run without values does not see every mismatch)."""
    args, kwargs = graph.example
    try:
        with torch.no_grad(), same_dice():
            shadow(model, real=True)[0](*args, **kwargs)
    except Exception as error:
        raise BadInput(NOT_RUN.format(type(error).__name__, error)) from error


def check_model(model: Any) -> None:
    """Refuse what cannot be cut, and say what to give instead."""
    if isinstance(model, torch.jit.ScriptModule):
        raise BadModel("the model is scripted (torch.jit); shrink the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise BadModel(f"the model is a {type(model).__name__}; an nn.Module is needed")
    if hasattr(model, "_orig_mod"):
        raise BadModel("the model is compiled; shrink model._orig_mod and compile the result")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise BadModel("the model is wrapped for parallel training; shrink model.module and wrap the result")
    devices = set()
    for name, module in modules_of(model):
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is not None:
                    devices.add(tensor.device)
        if _quantised(type(module)):
            raise BadModel(f"{name or 'the model'} is quantised; shrink the floating-point model and quantise the result")
    if len(devices) > 1:
        raise BadModel(f"the model lies on several devices ({', '.join(sorted(map(str, devices)))}); move it to one")


def _quantised(kind: type) -> bool:
    return kind.__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized"))
