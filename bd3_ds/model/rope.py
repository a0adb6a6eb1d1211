"""Rotary positions (Su et al. 2021), rotate-half form, on queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(position: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, d/2] in fp32, for positions [T]."""
    frequency = base ** (-torch.arange(0, head_width, 2, device=position.device, dtype=torch.float32) / head_width)
    angle = position.float()[:, None] * frequency  # [T, d/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, H, T, d] by the angles of its positions; pairs are (i, i + d/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
