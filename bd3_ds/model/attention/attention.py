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

from bd3_ds.model.attention.masks import AttentionMask
from bd3_ds.model.attention.stripe_attention import attend_in_stripes

COMPILER = "inductor"  # torch's own
SHAPES = 8  # of passes without gradients that have code for just their lengths
_OWN_CODE: set[Any] = set()


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
        return _flex(q, k, v, mask)
    if mask.is_full:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)
    if mask.is_causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense, scale=1.0)


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2)  # [B, H, Q, K]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Each shape has code of its own; without gradients lengths may be many, and those behind the first few share."""
    shapes: Any = (q.shape, k.shape)
    if not torch.is_grad_enabled() and shapes not in _OWN_CODE:
        if len(_OWN_CODE) < SHAPES:
            _OWN_CODE.add(shapes)
        else:
            shapes = None
    compiled = _compiled_flex((q.dtype, q.device, mask.documents is not None, torch.is_grad_enabled(), shapes))
    mixed: Tensor = compiled(q, k, v, mask.flex)
    return mixed


@lru_cache(maxsize=64)
def _compiled_flex(key: tuple[Any, ...]) -> Any:
    """flex_attention compiled for inputs of one kind.

    torch gives up on a piece of code after eight compilations of it and runs it eagerly, which for flex is dense: one
    compiled function for all shapes, types and gradient modes would come to that. So each has a copy of the code.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attend_in_tiles(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask, scale=1.0)

    # torch counts by code object, and two closures of one function share theirs.
    attend_in_tiles.__code__ = attend_in_tiles.__code__.replace()
    return torch.compile(attend_in_tiles, backend=COMPILER, dynamic=key[-1] is None)
