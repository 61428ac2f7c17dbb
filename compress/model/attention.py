"""Scaled dot-product attention: our own for a block by itself, and eager attention as transformers' interface has it.

Every function takes (module, query, key, value, mask, **options): query (batch, heads, length, head_dim), key and
value (batch, key heads, keys, head_dim), and a mask as `masks.mask_unless_causal` makes it. It returns the heads' mixed
values (batch, length, heads, head_dim) and the weights, or None for them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Mixed = tuple[Tensor, Tensor | None]


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
) -> Mixed:
    """PyTorch's own kernel; without a mask causal, one query sees all keys."""
    causal = attention_mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=causal, enable_gqa=grouped
    )
    return mixed.transpose(1, 2), None


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> Mixed:
    """softmax(query key^T scaling + mask) value, the softmax in float32. Without a mask every query sees every key."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # (batch, heads, length, keys)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights
