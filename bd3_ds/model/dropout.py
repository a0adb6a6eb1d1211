"""Dropout with cheap masks on CPUs, where torch draws one Bernoulli number at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 2**16  # a mask's probability is a multiple of 1 / _LEVELS


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero elements of x with probability `rate` and divide the others by 1 - rate, in training only.

    On CPUs one random 64-bit word of torch's generator serves four elements, 16 bits each; the rate is rounded to
    1/65536, and the scale to match.
    """
    if rate == 0 or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate, training)
    dropped = round(rate * _LEVELS)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    quarters = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2^15 … 2^15 - 1
    kept = quarters >= dropped - _LEVELS // 2
    scale = torch.tensor(_LEVELS / (_LEVELS - dropped), dtype=x.dtype)
    return x * (kept * scale)
