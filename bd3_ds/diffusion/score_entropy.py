"""SEDD with the absorbing process (Lou et al. 2024): the network gives log ratios p_t(y) / p_t([MASK])."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_ds.diffusion.chunked_head import chunked_loss

SIGMA_MAX = 6.9078  # the noise level of masking rate 1 - 1e-3; above it the network's conditioning saturates


def sigma_of(rate: Tensor) -> Tensor:
    """The total noise sigma = -log(1 - p) of masking rate p, at most SIGMA_MAX."""
    return (-torch.log1p(-rate)).clamp(max=SIGMA_MAX)


@dataclass(frozen=True, eq=False)
class ScoreNats:
    """What SEDD's head is asked for: (sum of weight x nats, nats [N]) of the diffusion-weighted score entropy.

    targets and sigma [N]. Nats are per unit of p'/p (1/t for the log-linear schedule): the derivative of sigma is
    p'/p (exp(sigma) - 1), and p'/p belongs to the weight. `weight` [N], or None where no gradient is wanted.
    """

    targets: Tensor
    sigma: Tensor
    mask_id: int
    weight: Tensor | None = None

    def __call__(self, hidden: Tensor, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """From hidden states [N, D] and the projection to the vocabulary."""
        return chunked_loss(hidden, matrix, bias, self.weight, self._rows)

    def of_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same from logits [N, V]."""
        nats = self._nats(*self._scores(logits.float(), slice(None)))
        return (nats if self.weight is None else self.weight * nats).sum(), nats.detach()

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

    def _rows(self, logits: Tensor, rows: slice, with_slopes: bool) -> tuple[Tensor, Tensor]:
        scores, at_targets, odds = self._scores(logits, rows)
        nats = self._nats(scores, at_targets, odds)
        if not with_slopes:
            return nats, scores
        slopes = scores.mul_(odds)
        slopes.scatter_add_(1, self.targets[rows, None], torch.full_like(odds, -1.0))
        return nats, slopes
