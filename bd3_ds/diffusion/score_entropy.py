"""SEDD with the absorbing process (Lou et al. 2024): the network gives log ratios p_t(y) / p_t([MASK])."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bd3_ds.diffusion.chunked_head import HeadLoss

SIGMA_MAX = 6.9078  # the noise level of masking rate 1 - 1e-3; above it the network's conditioning saturates


def sigma_of(rate: Tensor) -> Tensor:
    """The total noise sigma = -log(1 - p) of masking rate p, at most SIGMA_MAX."""
    return (-torch.log1p(-rate)).clamp(max=SIGMA_MAX)


@dataclass(frozen=True, eq=False)
class ScoreNats(HeadLoss):
    """The diffusion-weighted score entropy of the targets, which are masked at noise levels sigma [N].

    Nats are per unit of p'/p (1/t for the log-linear schedule): the derivative of sigma is p'/p (exp(sigma) - 1), and
    p'/p belongs to the weight.
    """

    sigma: Tensor = field(kw_only=True)

    def nats(self, logits: Tensor) -> Tensor:
        """See `HeadLoss`."""
        return self._nats(*self._scores(logits, slice(None)))

    def _scores(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Ratios [n, V], 0 for [MASK]; their logarithms at the targets [n, 1]; the odds of being masked [n, 1]."""
        odds = torch.expm1(self.sigma[rows, None])
        log_scores = logits - (odds.log() + math.log(logits.shape[-1] - 1.0))
        at_targets = log_scores.gather(1, self.targets[rows, None])
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_id
        return log_scores.masked_fill(is_mask, -torch.inf).exp(), at_targets, odds

    @staticmethod
    def _nats(scores: Tensor, at_targets: Tensor, odds: Tensor) -> Tensor:
        constant = (-odds.log() - 1) / odds
        return (odds * (scores.sum(-1, keepdim=True) - at_targets / odds + constant))[:, 0]

    def loss_and_grad(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """See `HeadLoss`."""
        scores, at_targets, odds = self._scores(logits, rows)
        nats = self._nats(scores, at_targets, odds)
        if not with_gradient:
            return nats, scores
        grad_logits = scores.mul_(odds)
        grad_logits.scatter_add_(1, self.targets[rows, None], torch.full_like(odds, -1.0))
        return nats, grad_logits
