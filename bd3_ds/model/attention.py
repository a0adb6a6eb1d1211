"""Scaled dot-product attention under an AttentionMask: one function, the backend chosen by name.

dense is the reference (explicit softmax in fp32), sdpa torch's fused kernels, flex block-sparse attention for GPUs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_ds.model.masks import AttentionMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, backend: str) -> Tensor:
    """Attention output [B, H, Q, d] for queries [B, H, Q, d] and keys and values [B, H, K, d].

    `auto` is flex on a GPU and sdpa elsewhere (flex has no backward pass on CPUs).
    """
    if backend == "auto":
        backend = "flex" if q.is_cuda and not mask.is_full and not mask.is_causal else "sdpa"
    if backend == "dense":
        return _dense(q, k, v, mask.dense)
    if backend == "flex":
        return _compiled_flex()(q, k, v, block_mask=mask.flex)
    if mask.is_full:
        return F.scaled_dot_product_attention(q, k, v)
    if mask.is_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense)


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, H, Q, K]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
