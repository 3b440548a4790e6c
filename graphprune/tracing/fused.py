"""Kernels that do many operations in one call: running without them, and keeping weights as they want them.

>>> with spelled_out(nn.LSTM(2, 3)):
...     torch.backends.mkldnn.enabled
False
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def spelled_out(model: nn.Module) -> Iterator[None]:
    """Recurrent layers run as the products that they are made of: the fused kernels have no gradient in evaluation mode (cuDNN), and nobody counts them."""
    with ExitStack() as scopes:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            scopes.enter_context(recurrent())
        yield


@contextmanager
def recurrent() -> Iterator[None]:
    """Without the fused kernels of recurrent layers."""
    with torch.backends.cudnn.flags(enabled=False), unfused():
        yield


@contextmanager
def unfused() -> Iterator[None]:
    """Without the kernels of oneDNN, whose parts cannot be seen."""
    fused = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = fused


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` by the products that it is made of.

    >>> q = torch.randn(1, 2, 4, 8)
    >>> torch.allclose(attention(q, q, q), nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-5)
    True
    """
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        zero, never = (torch.full((), number, dtype=query.dtype, device=attn_mask.device) for number in (0.0, -torch.inf))
        attn_mask = torch.where(attn_mask, zero, never)
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


def gathered(model: nn.Module) -> nn.Module:
    """The weights of recurrent layers in one piece of memory each, as their kernels on a GPU want them; a copy has them apart."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and all(isinstance(weight, nn.Parameter) for weight in module._flat_weights):  # none is computed anew for each call
            module.flatten_parameters()
    return model
