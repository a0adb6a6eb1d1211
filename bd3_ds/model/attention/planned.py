"""What stands for attention where memory is planned: nothing is computed, on tensors without memory (device meta).

Each makes, and keeps for the backward pass, tensors as large as those of the backends that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def like_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of kernels that keep what they are given, their output and a number for each query: [B, H, Q, d]."""
    mixed: Tensor = _LikeFused.apply(q, k, v)
    return mixed


def like_stripes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of `stripe_attention.attend_in_stripes`: [B, H, Q, d]."""
    mixed: Tensor = _LikeStripes.apply(q, k, v)
    return mixed


class _LikeFused(torch.autograd.Function):
    """flex and sdpa: queries, keys and values as they come (values are a view of qkv), output, log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mixed, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return mixed

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _LikeStripes(torch.autograd.Function):
    """Queries, keys and values side by side; gradients of keys and values are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q.contiguous(), k.contiguous(), v.contiguous())
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors
        d_k, d_v = (part.new_empty(part.shape, dtype=torch.float32) for part in (k, v))
        return torch.empty_like(q), d_k.to(k.dtype), d_v.to(v.dtype)
