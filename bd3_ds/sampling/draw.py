"""Tokens from the network's logits: temperature, truncation, a guard against repetition, inversion of the distribution.

A token takes one uniform number in fp64. The 24 bits of an fp32 number, or of fp32 Gumbel noise, would never choose
rare tokens of a large vocabulary and so sharpen the distribution (Zheng et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bd3_ds.sampling.options import Options


@dataclass(frozen=True)
class Drawn:
    """What came of N places, each [N].

    tokens, and the model's own probability of each, fp64. surest: the probability of the likeliest token. entropy of
    the model's distribution in nats. log_mass: logarithm of the summed exponentials of all logits but [MASK]'s. The
    last four know nothing of temperature, truncation and guard.
    """

    tokens: Tensor
    probability: Tensor
    surest: Tensor
    entropy: Tensor
    log_mass: Tensor

    @staticmethod
    def joined(parts: Sequence[Drawn]) -> Drawn:
        """One after the other."""
        return Drawn(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Drawn)))


def draw(logits: Tensor, u: Tensor, mask_id: int, options: Options, seen: Tensor | None = None) -> Drawn:
    """Tokens for logits [N, V] as the network gives them, by uniform numbers u [N] fp64 in [0, 1).

    [MASK] has probability 0. `seen` [N, R] are the ids that the guard against repetition is about.
    """
    scores = logits.double()
    scores[:, mask_id] = -torch.inf
    log_mass = scores.logsumexp(-1)
    log_p = scores - log_mass[:, None]
    p = log_p.exp()
    entropy = -(p * log_p.clamp(min=-1e9)).sum(-1)
    tokens = draw_tokens(token_weights(log_p, options, seen), u)
    chosen = p.gather(-1, tokens[:, None])[:, 0]
    return Drawn(tokens, chosen, p.max(-1).values, entropy, log_mass)


def draw_tokens(weights: Tensor, u: Tensor) -> Tensor:
    """Token ids [N] with chances in proportion to weights [N, V] fp64, by uniform numbers u [N] fp64 in [0, 1)."""
    cumulative = weights.cumsum(-1)
    # The first token whose cumulative weight exceeds the target; tokens of weight 0 exceed nothing new.
    target = u[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


def token_weights(log_p: Tensor, options: Options, seen: Tensor | None = None) -> Tensor:
    """What tokens are drawn from, [N, V] in proportion to their chances, for the model's log p [N, V] fp64."""
    if options.repetition_penalty > 1 and seen is not None:
        again = torch.zeros_like(log_p).scatter_(-1, seen, math.log(options.repetition_penalty))
        log_p = log_p - again
    if options.temperature == 0:
        return torch.zeros_like(log_p).scatter_(-1, log_p.argmax(-1, keepdim=True), 1.0)
    p = log_p.exp() if options.temperature == 1 else (log_p / options.temperature).softmax(-1)
    if options.top_k is not None and options.top_k < p.shape[-1]:
        best, places = p.topk(options.top_k, dim=-1)
        p = torch.zeros_like(p).scatter_(-1, places, best)
    if options.nucleus is not None:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # weight of all tokens more likely than this one
        p = torch.zeros_like(p).scatter_(-1, order, ordered.where(before < options.nucleus * p.sum(-1, True), 0.0))
    return p
