"""From logits to probabilities, and to nats at masked positions.

SUBS (Sahoo et al. 2024): [MASK] has probability 0 and unmasked tokens carry over, so only masked positions cost.
"""

from __future__ import annotations

import torch
from torch import Tensor


def subs_log_probs(logits: Tensor, mask_id: int) -> Tensor:
    """log p over the vocabulary in fp32, with [MASK] excluded; logits [..., V] as the network gives them."""
    logits = logits.float()
    excluded = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(excluded, -torch.inf).log_softmax(-1)


def subs_nll(logits: Tensor, targets: Tensor, mask_id: int) -> Tensor:
    """-log p(target) in nats [N], for logits [N, V] at masked positions and their clean tokens [N]."""
    return -subs_log_probs(logits, mask_id).gather(-1, targets[:, None])[:, 0]
