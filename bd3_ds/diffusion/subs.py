"""From logits to probabilities, and to nats at masked positions.

SUBS (Sahoo et al. 2024): [MASK] has probability 0 and unmasked tokens carry over, so only masked positions cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_ds.diffusion.chunked_head import chunked_loss


def subs_log_probs(logits: Tensor, mask_id: int) -> Tensor:
    """log p over the vocabulary in fp32, with [MASK] excluded; logits [..., V] as the network gives them."""
    logits = logits.float()
    excluded = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(excluded, -torch.inf).log_softmax(-1)


def subs_nll(logits: Tensor, targets: Tensor, mask_id: int) -> Tensor:
    """-log p(target) in nats [N], for logits [N, V] at masked positions and their clean tokens [N]."""
    return -subs_log_probs(logits, mask_id).gather(-1, targets[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class SubsNats:
    """What a network's head is asked for: (sum of weight x nats, nats [N]) of the clean tokens `targets` [N].

    `weight` [N] is each token's in the loss; None where no gradient is wanted (the sum is then plain).
    """

    targets: Tensor
    mask_id: int
    weight: Tensor | None = None

    def __call__(self, hidden: Tensor, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """From hidden states [N, D] and the projection to the vocabulary."""
        return chunked_loss(hidden, matrix, bias, self.weight, self._rows)

    def of_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same from logits [N, V]."""
        nats = subs_nll(logits, self.targets, self.mask_id)
        return (nats if self.weight is None else self.weight * nats).sum(), nats.detach()

    def _rows(self, logits: Tensor, rows: slice, with_slopes: bool) -> tuple[Tensor, Tensor]:
        logits[:, self.mask_id] = -torch.inf
        log_probs = logits.log_softmax(-1)
        targets = self.targets[rows, None]
        nats = -log_probs.gather(1, targets)
        if not with_slopes:
            return nats[:, 0], log_probs
        slopes = log_probs.exp_()
        slopes.scatter_add_(1, targets, torch.full_like(nats, -1.0))
        return nats[:, 0], slopes
