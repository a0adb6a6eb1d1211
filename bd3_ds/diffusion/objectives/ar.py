"""AR: left to right, each token from those before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_ds.config.registries import OBJECTIVES, TOKEN, Objective

if TYPE_CHECKING:
    from bd3_ds.diffusion.objective import Batch, Denoiser, Loss


def loss(denoiser: Denoiser, batch: Batch) -> Loss:
    """The negative log-likelihood; every position is a masked position at rate 1."""
    import torch

    from bd3_ds.diffusion.noise import next_token_targets
    from bd3_ds.diffusion.objective import Loss, by_rate, takes_host_positions
    from bd3_ds.diffusion.subs import SubsNats
    from bd3_ds.runtime.host_to_device import send

    x0, device = batch.x0, batch.device
    query_index, target_index = next_token_targets(x0, batch.documents)
    targets = send(x0.flatten()[target_index], device)
    at = query_index if takes_host_positions(denoiser) else send(query_index, device)
    x0 = send(x0, device)
    weight = torch.full(at.shape, 1 / (len(x0) * batch.scored_per_sequence), device=device)
    total, nats = denoiser(x0, None, sigma=None, at=at, read=SubsNats(targets, batch.mask_id, weight))
    return Loss(total, total.detach(), None, None, *by_rate(nats.double(), torch.ones_like(nats)))


OBJECTIVES.register(
    "ar",
    Objective("an autoregressive language model", loss, causal=True, blocks=TOKEN, bound="autoregressive"),
)
