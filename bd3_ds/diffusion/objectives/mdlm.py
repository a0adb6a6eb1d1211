"""MDLM (Sahoo et al. 2024): masked diffusion of whole sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_ds.config.registries import OBJECTIVES, Objective

if TYPE_CHECKING:
    from bd3_ds.diffusion.objective import Batch, Denoiser, Loss


def loss(denoiser: Denoiser, batch: Batch) -> Loss:
    """Cross-entropy of masked tokens, weighted by their rates."""
    from bd3_ds.diffusion.objective import cross_entropy, masked_loss

    return masked_loss(denoiser, batch, cross_entropy)


OBJECTIVES.register("mdlm", Objective("a masked diffusion language model (MDLM)", loss))
