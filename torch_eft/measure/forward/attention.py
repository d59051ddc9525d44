"""Scaled dot-product attention in elementary operations.

The fused kernels have a first derivative only, and in forward mode none.
"""

import math

import torch
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """softmax(scale Q K^T + mask) V as in ``F.scaled_dot_product_attention``; None with dropout."""
    if dropout_p > 0:
        return None
    if enable_gqa:
        key, value = _repeated(key, query), _repeated(value, query)
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return scores.softmax(-1) @ value
    # A row that sees nothing would be 0/0. torch returns zeros for it; its derivatives must be zeros, too.
    constant = attn_mask.detach()
    blind = (constant.logical_not() if constant.dtype == torch.bool else constant == -math.inf).all(-1, keepdim=True)
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill((attn_mask | blind).logical_not(), -math.inf)
    else:
        scores = scores + attn_mask.masked_fill(blind, 0.0)
    return scores.softmax(-1).masked_fill(blind, 0.0) @ value


def _repeated(heads: Tensor, query: Tensor) -> Tensor:
    return heads.repeat_interleave(query.shape[-3] // heads.shape[-3], -3)
