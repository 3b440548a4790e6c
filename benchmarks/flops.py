"""Our MACs beside torch's own counter, on the model as it is: :func:`flops`, for any benchmark that has a model at hand.

torch's counter sees single operations, so fused paths are switched off for it. Where it cannot count (an operation
without a formula, code that insists on gradients) the row says so instead of a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphprune


def counted(model: torch.nn.Module, args: Any, kwargs: dict | None = None) -> int:
    """Multiply-accumulates by torch's counter."""
    args = args if isinstance(args, tuple) else (args,)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # A recurrent layer in one call is not counted; without that kernel torch takes it apart.
    apart = any(isinstance(module, torch.nn.RNNBase) for module in model.modules())
    try:
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=not apart), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*args, **(kwargs or {}))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def flops(model: torch.nn.Module, args: Any, kwargs: dict | None = None) -> dict[str, Any]:
    """``{"macs_gap": ours / torch's - 1}`` (0 when they agree exactly), or ``{"macs_why": …}`` where torch cannot count."""
    ours = graphprune.profile(model, args, kwargs).macs
    try:
        theirs = counted(model, args, kwargs)
    except Exception as error:
        return {"macs_why": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
    return {"macs_gap": ours / theirs - 1 if theirs else float(ours > 0)}
