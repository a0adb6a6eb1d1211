"""BD3-LM (Arriola et al. 2025): masked diffusion in blocks, each given the clean blocks before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_ds.config.registries import CONFIGURED, OBJECTIVES, Objective

if TYPE_CHECKING:
    from bd3_ds.diffusion.objective import Batch, Denoiser, Loss


def loss(denoiser: Denoiser, batch: Batch) -> Loss:
    """Cross-entropy of masked tokens, weighted by their blocks' rates."""
    from bd3_ds.diffusion.objective import cross_entropy, masked_loss

    return masked_loss(denoiser, batch, cross_entropy)


OBJECTIVES.register("bd3", Objective("a block-diffusion language model (BD3-LM)", loss, blocks=CONFIGURED))
