"""Scaled dot-product attention under an AttentionMask: one function, the backend chosen by name.

dense is the reference (explicit softmax in fp32), sdpa torch's fused kernels, flex block-sparse attention for GPUs,
stripes its counterpart for CPUs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_ds.model.masks import AttentionMask
from bd3_ds.model.stripe_attention import attend_in_stripes


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, backend: str) -> Tensor:
    """Attention output [B, H, Q, d] for queries [B, H, Q, d] and keys and values [B, H, K, d].

    Without a mask nothing is hidden. Queries come scaled: divided by the square root of d. `auto` takes sdpa where
    nothing or all of the future is hidden, elsewhere flex on a GPU and stripes on a CPU (flex has no backward pass
    there). An export of a run with stripes may come to a GPU: it is auto there.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
    if backend == "auto" or (backend == "stripes" and q.is_cuda):
        backend = "sdpa" if mask.is_full or mask.is_causal else "flex" if q.is_cuda else "stripes"
    if backend == "stripes" and mask.layout is not None:
        return attend_in_stripes(q, k, v, mask)
    if backend == "dense":
        return _dense(q, k, v, mask.dense)
    if backend == "flex":
        return _compiled_flex()(q, k, v, block_mask=mask.flex, scale=1.0)
    if mask.is_full:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
    if mask.is_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, scale=1.0)


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2)  # [B, H, Q, K]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
