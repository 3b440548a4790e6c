"""Attention in one call: two products, and a softmax over the keys between them."""

from __future__ import annotations

from .notation import Expr, expr
from .record import LETTERS, computes


def _products(query, key, value, *args, **kwargs) -> list[Expr]:
    lead = " ".join(LETTERS[: len(query.shape) - 2])
    # The weights that the second multiplies with are no tensor of the run: as many as there are queries, for each key.
    return [expr(f"{lead} q d, {lead} k d -> {lead} q k", query, key), expr(f"{lead} k _, {lead} k e -> {lead} q e", key, value)]


@computes("scaled_dot_product_attention", "_scaled_dot_product_attention_math", products=_products)
def attention(query, key, value, *args, **kwargs):
    # The default scale depends on d, and what is weighed on the number of keys: both stay.
    lead = " ".join(LETTERS[: len(query.shape) - 2])
    return expr(f"{lead} _ _, {lead} _ _, {lead} _ e -> {lead} _ e", query, key, value)


@computes("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
          "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable", products=_products)  # fmt: skip
def fused_attention(query, key, value, *args, **kwargs):
    # These kernels want queries, keys and values of one size.
    lead = " ".join(LETTERS[: len(query.shape) - 2])
    return expr(f"{lead} _ _, {lead} _ _, {lead} _ _ -> {lead} _ _", query, key, value)
