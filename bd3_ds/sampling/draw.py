"""One token from the network's logits: temperature, nucleus, then inversion of the distribution function."""

from __future__ import annotations

import torch
from torch import Tensor


def token_probabilities(logits: Tensor, mask_id: int, temperature: float = 1.0, nucleus: float | None = None) -> Tensor:
    """The distribution [N, V] in fp64 from which a token is drawn; logits [N, V] as the network gives them.

    [MASK] has probability 0. `temperature` divides the logits (0: all on the most likely token); `nucleus` in (0, 1]
    keeps the smallest set of most likely tokens that reaches this probability, the token that crosses it included.
    """
    excluded = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    scores = logits.double().masked_fill(excluded, -torch.inf)
    if temperature == 0:
        best = scores.argmax(-1, keepdim=True)
        return torch.zeros_like(scores).scatter_(-1, best, 1.0)
    probabilities = (scores / temperature).softmax(-1)
    if nucleus is None:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # probability of all tokens more likely than this one
    kept = torch.zeros_like(probabilities).scatter_(-1, order, ordered.where(before < nucleus, 0.0))
    return kept / kept.sum(-1, keepdim=True)


def draw_tokens(probabilities: Tensor, u: Tensor) -> Tensor:
    """Token ids [N] from distributions [N, V] fp64 by uniform numbers u [N] fp64 in [0, 1).

    One number a token, in fp64: the 24 bits of an fp32 number would never choose rare tokens of a large vocabulary
    and so sharpen the distribution.
    """
    cumulative = probabilities.cumsum(-1)
    # The first token whose cumulative probability exceeds the target; tokens of probability 0 exceed nothing new.
    target = u[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)
