"""Texts from a network: block diffusion by first hitting (Zheng et al. 2024), and token by token for AR.

First hitting simulates the reverse process without discretising time. Of n masked tokens each has its own unmasking
time, uniform below the current time t (log-linear schedule); the next of them is at t * u^(1/n), it is any of the n
with equal chance, and its token comes from the network's prediction of x0 at that moment. So a token costs one
evaluation of the network. SUBS networks do not look at t, only SEDD's does.

SEDD: its network gives log p_t(y) / p_t([MASK]). With the absorbing process this ratio is the posterior p(x0 = y | x_t)
times a factor that depends on time alone, so the scores over all tokens but [MASK], normalised, are that posterior, and
the same sampler applies.

Every random number is a function of (seed, row, place in the row): a text does not depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bd3_ds.diffusion.score_entropy import sigma_of
from bd3_ds.model.dit import DiT
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.runtime.rng import Purpose, generator
from bd3_ds.sampling.draw import draw_tokens, token_probabilities

TIME, PLACE, TOKEN = range(3)  # what the three uniform numbers of a step are for

Progress = Callable[[int], None]  # told how many tokens have just been written


@dataclass(frozen=True)
class Samples:
    """tokens [N, T]; nfe [N], evaluations of the network that wrote each text; cache_forwards, passes over a block of
    text that only filled its cache (AR's evaluations fill it themselves)."""

    tokens: Tensor
    nfe: Tensor
    cache_forwards: int


@torch.no_grad()  # not inference_mode: masks made here are kept and may serve a training pass later
def sample_blocks(
    model: DiT,
    *,
    num: int,
    length: int,
    block_size: int,
    mask_id: int,
    prompt: Tensor,
    seed: int = 0,
    temperature: float = 1.0,
    nucleus: float | None = None,
    sigma_from_rate: bool = False,
    first_row: int = 0,
    progress: Progress | None = None,
) -> Samples:
    """`num` texts of `length` tokens, block after block; one block (block_size >= length) is MDLM, or SEDD with
    `sigma_from_rate`.

    prompt [P] or [num, P] holds the given tokens from position 0 (BOS) on, with mask_id where one is to be written. A
    length that ends inside a block is cut out of the whole block. `first_row` numbers the rows when they come in parts.
    """
    text = blank_text(model, num, -(-length // block_size) * block_size, mask_id, prompt)
    draws = uniform_draws(seed, first_row, text)
    cache = KVCache(model.network.layers)
    nfe = torch.zeros(num, dtype=torch.long, device=text.device)
    cache_forwards = 0
    for start in range(0, text.shape[1], block_size):
        block = text[:, start : start + block_size]  # a view: writing to it writes the text
        missing = (block == mask_id).sum(1)  # [N]
        if not missing.any():
            continue
        if len(cache) < start:
            model.encode(text[:, len(cache) : start], cache, block_size=block_size)
            cache_forwards += 1
        t = torch.ones(num, dtype=torch.float64, device=text.device)
        for step in range(int(missing.max())):
            left = (missing - step).clamp(min=0)  # [N]; rows with none left wait
            u = draws[:, start + step]  # [N, 3]
            t = t * u[:, TIME] ** (1 / left.clamp(min=1))
            at = _choose_masked(block == mask_id, left, u[:, PLACE])
            sigma = sigma_of(t) if sigma_from_rate else None
            places = at.flatten().nonzero()[:, 0]
            logits = model.decode(block, cache, start=start, block_size=block_size, sigma=sigma, at=places)
            block[at] = draw_tokens(token_probabilities(logits, mask_id, temperature, nucleus), u[left > 0, TOKEN])
            if progress:
                progress(int(at.sum()))
        nfe += missing
    return Samples(text[:, :length], nfe, cache_forwards)


@torch.no_grad()
def sample_autoregressive(
    model: DiT,
    *,
    num: int,
    length: int,
    mask_id: int,
    prompt: Tensor,
    seed: int = 0,
    temperature: float = 1.0,
    nucleus: float | None = None,
    first_row: int = 0,
    progress: Progress | None = None,
) -> Samples:
    """`num` texts of `length` tokens from a causal network, each token from all before it; arguments as above."""
    text = blank_text(model, num, length, mask_id, prompt)
    draws = uniform_draws(seed, first_row, text)
    missing = text == mask_id  # [N, T]
    cache = KVCache(model.network.layers)
    for position in missing.any(0).nonzero()[:, 0].tolist():
        fresh = text[:, len(cache) : position]
        last = torch.arange(1, num + 1, device=text.device) * fresh.shape[1] - 1
        logits = model.decode(fresh, cache, start=len(cache), block_size=1, at=last)  # [N, V]
        drawn = draw_tokens(token_probabilities(logits, mask_id, temperature, nucleus), draws[:, position, TOKEN])
        text[:, position] = torch.where(missing[:, position], drawn, text[:, position])
        if progress:
            progress(int(missing[:, position].sum()))
    return Samples(text, missing.sum(1), 0)


def blank_text(model: DiT, num: int, length: int, mask_id: int, prompt: Tensor) -> Tensor:
    """[num, length] on the model's device: the prompt, then masks."""
    text = torch.full((num, length), mask_id, device=next(model.parameters()).device)
    text[:, : prompt.shape[-1]] = prompt
    return text


def uniform_draws(seed: int, first_row: int, text: Tensor) -> Tensor:
    """Uniform numbers [N, T, 3] fp64 for the steps of each row; a longer text only adds to a shorter one's."""
    num, length = text.shape
    rows = [generator(seed, Purpose.SAMPLING, first_row + row).random((length, 3)) for row in range(num)]
    return torch.from_numpy(np.stack(rows)).to(text.device)


def _choose_masked(masked: Tensor, left: Tensor, u: Tensor) -> Tensor:
    """One true place, uniformly, in each row of masked [N, T] that has any: boolean [N, T]; left [N] counts them."""
    rank = (u * left).long()  # 0 … left - 1
    return masked & (masked.cumsum(1) == rank[:, None] + 1)
