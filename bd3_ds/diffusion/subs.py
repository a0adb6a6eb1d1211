"""From logits to probabilities, and to nats at masked positions.

SUBS (Sahoo et al. 2024): [MASK] has probability 0 and unmasked tokens carry over, so only masked positions cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_ds.diffusion.chunked_head import HeadLoss


def subs_log_probs(logits: Tensor, mask_id: int) -> Tensor:
    """log p over the vocabulary in fp32, with [MASK] excluded; logits [..., V] as the network gives them."""
    logits = logits.float()
    excluded = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(excluded, -torch.inf).log_softmax(-1)


def subs_nll(logits: Tensor, targets: Tensor, mask_id: int) -> Tensor:
    """-log p(target) in nats [N], for logits [N, V] at masked positions and their clean tokens [N]."""
    return -subs_log_probs(logits, mask_id).gather(-1, targets[:, None])[:, 0]


class SubsNats(HeadLoss):
    """-log p of the targets, which are masked tokens."""

    def nats(self, logits: Tensor) -> Tensor:
        """See `HeadLoss`."""
        return subs_nll(logits, self.targets, self.mask_id)

    def loss_and_grad(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """See `HeadLoss`."""
        logits[:, self.mask_id] = -torch.inf
        log_probs = logits.log_softmax(-1)
        targets = self.targets[rows, None]
        nats = -log_probs.gather(1, targets)
        if not with_gradient:
            return nats[:, 0], log_probs
        grad_logits = log_probs.exp_()
        grad_logits.scatter_add_(1, targets, torch.full_like(nats, -1.0))
        return nats[:, 0], grad_logits
