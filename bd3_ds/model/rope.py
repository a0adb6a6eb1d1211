"""Rotary positions (Su et al. 2021), rotate-half form, on queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_angles(position: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, d/2] in fp32, for positions [T].

    Scaling them scales what they rotate: so queries are divided by the square root of d at no cost.
    """
    frequency = base ** (-torch.arange(0, head_width, 2, device=position.device, dtype=torch.float32) / head_width)
    angle = position.float()[:, None] * frequency  # [T, d/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, H, T, d] by the angles of its positions; pairs are (i, i + d/2)."""
    if not torch.is_grad_enabled():
        return _turn(x, cos, sin)
    turned: Tensor = _Rotate.apply(x, cos, sin)
    return turned


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation, so nothing of x is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half].float(), x[..., half:].float()
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turned[..., :half] = (a * cos).addcmul_(b, sin, value=-1)
    turned[..., half:] = (b * cos).addcmul_(a, sin)
    return turned
