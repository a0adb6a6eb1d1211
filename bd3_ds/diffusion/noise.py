"""Counter-based noise: masking rates and masks as functions of (seed, step, slot in the global batch, block).

The G x B blocks of a global batch (G sequences of B blocks) share one stratification of [0, 1): each takes one of the
G x B strata by a permutation drawn for the step. So rates cover the proposal evenly over the whole batch, every block
of every sequence sees every rate in the long run, and nothing depends on world size, micro-batch or accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bd3_ds.config.schema import WeightConfig
from bd3_ds.diffusion.frequency import token_rates
from bd3_ds.diffusion.proposal import RateProposal
from bd3_ds.diffusion.weighting import loss_weight
from bd3_ds.runtime.rng import Purpose, generator


@dataclass(frozen=True)
class Noise:
    """A micro-batch's noise, fp64. Its rows are sequences, or K neighbouring rows the views of a sequence.

    rate: masking rate of each block [b, B]. bound_weight and loss_weight: weights of its masked tokens' nats in the
    estimate of the bound and in the loss [b, B]. token_rate: rate of each token [b, L], None where all tokens of a
    block have the block's. draws: uniform numbers [b, L]; a token is masked where its number is below its rate.
    """

    rate: Tensor
    bound_weight: Tensor
    loss_weight: Tensor
    token_rate: Tensor | None
    draws: Tensor


def make_noise(
    u: Tensor,
    draws: Tensor,
    proposal: RateProposal,
    weight: WeightConfig,
    masking_score: Tensor | None = None,
    documents: Tensor | None = None,
) -> Noise:
    """Noise from uniform numbers: u [b, B] for the blocks' rates, draws [b, L] for the masks.

    masking_score [b, L] are the tokens' masking scores (`frequency.py`), None where all are equal; padding, where
    documents [b, L] are below 0, is left out.
    """
    rate, bound_weight = proposal.draw(u)
    tokens = None
    if masking_score is not None:
        counts = scored_positions(masking_score, documents).view(*rate.shape, -1)
        tokens = token_rates(masking_score.view(*rate.shape, -1), rate, counts).flatten(1)
    return Noise(rate, bound_weight, loss_weight(weight, rate, bound_weight), tokens, draws)


def stratified_times(seed: int, step: int, slots: np.ndarray, global_batch: int, blocks: int) -> Tensor:
    """u in [0, 1) per block, [len(slots), blocks] fp64, for these slots of the step's global batch."""
    return torch.from_numpy(_times_of_step(seed, step, global_batch, blocks)[slots])


@lru_cache(maxsize=1)  # the micro-batches of a step take their rows of one table
def _times_of_step(seed: int, step: int, global_batch: int, blocks: int) -> np.ndarray:
    """u in [0, 1) of every block of the step's global batch, [global_batch, blocks] fp64."""
    total = global_batch * blocks
    order = generator(seed, Purpose.RATE_STRATA, step).permutation(total)
    jitter = generator(seed, Purpose.RATE_JITTER, step).random(total)
    return ((order + jitter) / total).reshape(global_batch, blocks)


def mask_draws(seed: int, step: int, slots: np.ndarray, length: int) -> Tensor:
    """Uniform numbers [len(slots), length] fp64; a token is masked where its number is below its rate."""
    return torch.from_numpy(np.stack([generator(seed, Purpose.MASK, step, int(slot)).random(length) for slot in slots]))


def choose_block_size(seed: int, step: int, sizes: Sequence[int]) -> int:
    """The block size of a step, uniform over `sizes`; the same on every rank."""
    if len(sizes) == 1:
        return sizes[0]
    return int(sizes[generator(seed, Purpose.BLOCK_SIZE, step).integers(len(sizes))])


def scored_positions(x0: Tensor, documents: Tensor | None = None, among: Tensor | None = None) -> Tensor:
    """Where texts x0 [b, L] are masked and scored, boolean: all positions but 0, which is given, and padding.

    Padding is where documents [b, L] are below 0; without `documents` there is none. `among` [b, L], boolean, restricts
    them further.
    """
    scored = torch.ones_like(x0, dtype=torch.bool) if documents is None else documents >= 0
    scored[:, 0] = False
    return scored if among is None else scored & among


def next_token_targets(x0: Tensor, documents: Tensor | None, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Next-token pairs of texts [b, L]: (query_index, target_index), each [N], in the flattened texts.

    The query of a scored token is the last token of text before it, so that padding in between does not count.
    """
    index = torch.arange(x0.numel(), device=x0.device).view(x0.shape)
    scored = scored_positions(x0, documents, among)[:, 1:]
    text = index if documents is None else torch.where(documents < 0, -1, index)
    last_text = text.cummax(1).values[:, :-1]
    return last_text[scored], index[:, 1:][scored]


def corrupt(
    x0: Tensor, rate: Tensor, draws: Tensor, mask_id: int, scored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask tokens x0 [b, L] at `rate` [b, L] by `draws` [b, L]: (x_t, masked), both [b, L].

    `scored` [b, L] are the positions that can be masked; None: all but position 0.
    """
    masked = (draws < rate) & (scored_positions(x0) if scored is None else scored)
    return torch.where(masked, mask_id, x0), masked
