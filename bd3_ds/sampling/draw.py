"""Tokens sampled from logits: temperature, top-k and nucleus truncation, repetition penalty, inverse-CDF sampling.

A token takes one uniform number in fp64, and the CDF is summed up in fp64. The 24 bits of an fp32 number, or of fp32
Gumbel noise, would never choose rare tokens of a large vocabulary and so sharpen the distribution (Zheng et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bd3_ds.sampling.options import Options


@dataclass(frozen=True)
class SampledTokens:
    """The tokens of N positions and the model's predictions there, each [N].

    tokens, and the model's own probability of each, fp64. confidence: the probability of the likeliest token. entropy
    of the model's distribution in nats, 0 where it was not computed. log_mass: log-sum-exp of all logits but [MASK]'s.
    The last four are before temperature, truncation and repetition penalty.
    """

    tokens: Tensor
    probability: Tensor
    confidence: Tensor
    entropy: Tensor
    log_mass: Tensor

    @staticmethod
    def joined(parts: Sequence[SampledTokens]) -> SampledTokens:
        """The parts concatenated."""
        return SampledTokens(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(SampledTokens))
        )


def draw(
    logits: Tensor, u: Tensor, mask_id: int, options: Options, seen: Tensor | None = None, with_entropy: bool = True
) -> SampledTokens:
    """Tokens for logits [N, V] as the network gives them, by uniform numbers u [N] fp64 in [0, 1).

    [MASK] has probability 0; its logit is overwritten. `seen` [N, R] are the ids that the repetition penalty applies
    to.
    """
    scores = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    scores[:, mask_id] = -torch.inf
    top = scores.max(-1, keepdim=True).values
    below = scores - top  # [N, V], at most 0
    odds = below.exp()
    mass = odds.cumsum(-1, dtype=torch.float64)  # the CDF but for a factor
    total = mass[:, -1:]
    log_total = total.log()
    if options.shapes_tokens:
        tokens = draw_tokens(token_weights(below.double() - log_total, options, seen).cumsum(-1), u)
    else:
        tokens = draw_tokens(mass, u)
    chosen = odds.gather(-1, tokens[:, None]).double() / total
    entropy = torch.zeros_like(u)
    if with_entropy:
        expected = torch.where(odds > 0, odds * below, 0).sum(-1, dtype=torch.float64)
        entropy = log_total[:, 0] - expected / total[:, 0]
    return SampledTokens(tokens, chosen[:, 0], 1 / total[:, 0], entropy, (log_total + top)[:, 0])


def draw_tokens(mass: Tensor, u: Tensor) -> Tensor:
    """Token ids [N] by uniform numbers u [N] fp64 in [0, 1); mass [N, V] fp64 is the cumulative sum of the tokens'
    weights.
    """
    # The first token whose cumulative weight exceeds the target; tokens of weight 0 exceed nothing new.
    target = u[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp(max=mass.shape[-1] - 1)


def token_weights(log_p: Tensor, options: Options, seen: Tensor | None = None) -> Tensor:
    """Unnormalised probabilities [N, V] that tokens are drawn from, for the model's log p [N, V] fp64."""
    if options.repetition_penalty > 1 and seen is not None:
        again = torch.zeros_like(log_p).scatter_(-1, seen, math.log(options.repetition_penalty))
        log_p = log_p - again
    if options.temperature == 0:
        return torch.zeros_like(log_p).scatter_(-1, log_p.argmax(-1, keepdim=True), 1.0)
    p = log_p.exp() if options.temperature == 1 else (log_p / options.temperature).softmax(-1)
    if options.top_k is not None and options.top_k < p.shape[-1]:
        best, ids = p.topk(options.top_k, dim=-1)
        p = torch.zeros_like(p).scatter_(-1, ids, best)
    if options.nucleus is not None:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # weight of all tokens more likely than this one
        p = torch.zeros_like(p).scatter_(-1, order, ordered.where(before < options.nucleus * p.sum(-1, True), 0.0))
    return p
