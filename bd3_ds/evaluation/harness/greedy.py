"""Whether greedy decoding reproduces a continuation, found without decoding: rows leave at their first mismatch."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.diffusion.noise import next_token_targets
from bd3_ds.diffusion.score_entropy import sigma_of
from bd3_ds.model.dit import DiT
from bd3_ds.sampling.denoiser import in_chunks
from bd3_ds.sampling.draw import SampledTokens, draw
from bd3_ds.sampling.options import Options

GREEDY = Options(temperature=0.0)


@torch.no_grad()
def is_greedy(network: DiT, objective: str, x0: Tensor, scored: Tensor, block_size: int, mask_id: int) -> Tensor:
    """For which rows [b] of x0 [b, L], whole blocks, the scored tokens [b, L] are the ones that greedy decoding gives.

    AR: each is the most likely one given all tokens before it. Diffusion: as the sampler does it at temperature 0 with
    tokens_per_step=1, a block's most confident position first, each with its most likely token, positions where x0
    holds the mask id among them. While all that was written is right, the blocks before are those of x0, so that all
    blocks of a row are written side by side; rows leave at their first wrong token.
    """

    def likeliest(logits: Tensor, _first: int) -> SampledTokens:
        return draw(logits, torch.zeros(len(logits), dtype=torch.float64, device=logits.device), mask_id, GREEDY)

    read = in_chunks(likeliest, network.network.vocab_size)
    right = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
    if OBJECTIVES[objective].causal:
        at, target_index = next_token_targets(x0, None, scored)
        tokens = network(x0, block_size=1, at=at, read=read).tokens
        wrong = target_index[tokens != x0.flatten()[target_index]] // x0.shape[1]
        return right.index_fill_(0, wrong, False)

    blocks = scored.view(len(x0), -1, block_size).any(-1).repeat_interleave(block_size, dim=1)  # [b, L]
    masked = blocks & (scored | (x0 == mask_id))
    x_t = torch.where(masked, mask_id, x0)
    while True:
        rows = (right & (masked & scored).any(1)).nonzero()[:, 0]  # [R]
        if len(rows) == 0:
            return right
        now, clean = masked[rows], x0[rows]
        at = now.flatten().nonzero()[:, 0]
        sigma = sigma_of(now.double().mean(1)) if OBJECTIVES[objective].timed else None
        drawn = network(x_t[rows], clean, block_size=block_size, sigma=sigma, at=at, read=read)
        tokens = clean.masked_scatter(now, drawn.tokens)
        revealed = now & _most_confident(now, drawn.confidence, block_size)
        x_t[rows] = torch.where(revealed, tokens, x_t[rows])
        masked[rows] = now & ~revealed
        right[rows] = ~(revealed & scored[rows] & (tokens != clean)).any(1)


def _most_confident(now: Tensor, confidence: Tensor, block_size: int) -> Tensor:
    """The position of largest confidence [N] in each block of the positions `now` [R, L]: boolean [R, L]; the leftmost
    of equals."""
    values = torch.full(now.shape, -1.0, dtype=confidence.dtype, device=now.device).masked_scatter(now, confidence)
    by_block = values.view(len(now), -1, block_size)
    best = by_block == by_block.max(-1, keepdim=True).values
    return (best & (best.cumsum(-1) == 1)).flatten(1)
