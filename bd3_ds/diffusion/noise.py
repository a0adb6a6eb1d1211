"""Noise by place: masking rates and masks as functions of (seed, step, slot in the global batch, block).

The G x B blocks of a global batch (G sequences of B blocks) share one stratification of [0, 1): each takes one of the
G x B strata by a permutation drawn for the step. So rates cover [0, 1] evenly over the whole batch, every block of
every sequence sees every rate in the long run, and nothing depends on world size, micro-batch or accumulation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bd3_ds.runtime.rng import Purpose, generator


def stratified_times(seed: int, step: int, slots: np.ndarray, global_batch: int, blocks: int) -> Tensor:
    """u in [0, 1) per block, [len(slots), blocks] fp64, for these slots of the step's global batch."""
    total = global_batch * blocks
    order = generator(seed, Purpose.RATE_STRATA, step).permutation(total).reshape(global_batch, blocks)
    jitter = generator(seed, Purpose.RATE_JITTER, step).random(total).reshape(global_batch, blocks)
    return torch.from_numpy((order[slots] + jitter[slots]) / total)


def mask_draws(seed: int, step: int, slots: np.ndarray, length: int) -> Tensor:
    """Uniform numbers [len(slots), length] fp64; a token is masked where its number is below its block's rate."""
    return torch.from_numpy(np.stack([generator(seed, Purpose.MASK, step, int(slot)).random(length) for slot in slots]))


def corrupt(x0: Tensor, rate: Tensor, draws: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Mask tokens x0 [b, L] at `rate` [b, L] by `draws` [b, L]: (x_t, masked), both [b, L].

    Position 0 is given: it is never masked.
    """
    masked = draws < rate
    masked[:, 0] = False
    return torch.where(masked, mask_id, x0), masked
