"""Frequency-informed masking (Kosmopoulou et al. 2025): rare tokens are masked more often than frequent ones.

Each token of the vocabulary has a rarity in (0, 1], its relative rank from the most to the least frequent.
Raised to a power in [0, 1] that grows over the curriculum it is the token's masking score, and scores are moved
towards 0 or 1 until their mean over the block is the block's rate p. Power 0 is plain masking.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bd3_ds.config.schema import FrequencyConfig


def rarity(counts: np.ndarray) -> Tensor:
    """Rarity [V] fp64 in (0, 1] from how often each token occurs [V]; tokens that occur equally often share theirs."""
    _, inverse, times = np.unique(-counts.astype(np.int64), return_inverse=True, return_counts=True)
    last = np.cumsum(times)  # rank of the last token of each group of equals
    return torch.from_numpy(((last - (times - 1) / 2) / len(counts))[inverse])


def power_at(config: FrequencyConfig, step: int) -> float:
    """The power after `step` optimizer steps: linear from 0 over the curriculum."""
    if config.curriculum_steps == 0:
        return config.power
    return config.power * min(1.0, step / config.curriculum_steps)


def token_rates(masking_score: Tensor, rate: Tensor, scored: Tensor) -> Tensor:
    """Masking rates [b, B, L'] of tokens with these scores in (0, 1], whose mean over a block is its `rate` [b, B].

    Only tokens that can be masked count, `scored` [b, B, L']; the rates of others mean nothing.

    Below their mean, rates are scores scaled down; above it, what is left to 1 is scaled down instead, so that all
    rates stay in [0, 1] and keep their order.
    """
    counts = scored.to(masking_score.dtype)
    mean = ((masking_score * counts).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)).clamp(
        min=1e-300
    )
    p = rate[..., None]
    down = masking_score * (p / mean)
    up = 1 - (1 - masking_score) * ((1 - p) / (1 - mean).clamp(min=1e-300))
    return torch.where(p <= mean, down, up)
