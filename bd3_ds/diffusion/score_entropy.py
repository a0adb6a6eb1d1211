"""SEDD with the absorbing process (Lou et al. 2024): the network gives log ratios p_t(y) / p_t([MASK])."""

from __future__ import annotations

import torch
from torch import Tensor

SIGMA_MAX = 6.9078  # the noise level of masking rate 1 - 1e-3; above it the network's conditioning saturates


def sigma_of(rate: Tensor) -> Tensor:
    """The total noise sigma = -log(1 - p) of masking rate p, at most SIGMA_MAX."""
    return (-torch.log1p(-rate)).clamp(max=SIGMA_MAX)


def score_nll(logits: Tensor, targets: Tensor, sigma: Tensor, weight: Tensor, mask_id: int) -> Tensor:
    """The diffusion-weighted score entropy in nats [N] at masked positions.

    logits [N, V]; targets, sigma and weight [N]; `weight` is p'/p (1/t for the log-linear schedule), so that
    the derivative of sigma is weight * (exp(sigma) - 1).
    """
    odds = torch.expm1(sigma)
    vocabulary = logits.shape[-1]
    log_score = logits.float() - (odds.log() + torch.log(torch.tensor(vocabulary - 1.0)))[:, None]
    is_mask = torch.arange(vocabulary, device=logits.device) == mask_id
    positive = log_score.masked_fill(is_mask, -torch.inf).exp().sum(-1)
    negative = log_score.gather(-1, targets[:, None])[:, 0] / odds
    constant = (-odds.log() - 1) / odds
    return weight * odds * (positive - negative + constant)
