"""SEDD with the absorbing process (Lou et al. 2024): score entropy of a network conditioned on the noise level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_ds.config.registries import OBJECTIVES, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.diffusion.objective import Batch, Denoiser, Loss, MaskedTokens


def loss(denoiser: Denoiser, batch: Batch) -> Loss:
    """The diffusion-weighted score entropy at masked tokens."""
    from bd3_ds.diffusion.objective import masked_loss

    return masked_loss(denoiser, batch, score_entropy)


def score_entropy(denoiser: Denoiser, tokens: MaskedTokens) -> tuple[Tensor, Tensor]:
    """The loss and nats [N] of a network that is conditioned on each sequence's noise level."""
    from bd3_ds.diffusion.score_entropy import ScoreNats, sigma_of
    from bd3_ds.runtime.host_to_device import send

    sigma = send(sigma_of(tokens.rate[:, 0]).float(), tokens.x_t.device)
    of_token = sigma[tokens.at // tokens.x_t.shape[1]]
    read = ScoreNats(targets=tokens.targets, sigma=of_token, mask_id=tokens.mask_id, weight=tokens.weight)
    return denoiser(tokens.x_t, None, sigma=sigma, at=tokens.denoiser_at, read=read)


OBJECTIVES.register(
    "sedd",
    # Its bound is an integral over time, which only Monte Carlo estimates.
    Objective(
        "a diffusion language model by score entropy (SEDD)",
        loss,
        timed=True,
        estimators=("mc",),
        bound="score entropy",
        analytic=True,
    ),
)
