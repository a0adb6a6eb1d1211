"""A forward and backward pass on one sequence of random tokens: what cannot work fails here, in seconds."""

from __future__ import annotations

import numpy as np
import torch

from bd3_ds.config.schema import AR, RunConfig, block_sizes
from bd3_ds.diffusion.noise import choose_block_size, make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.model.build import initialise
from bd3_ds.model.dit import DiT, as_denoiser
from bd3_ds.parallel.apply import prepare_layers
from bd3_ds.runtime.rng import Purpose, generator


def dry_step(model: DiT, run: RunConfig) -> float:
    """The loss in nats per scored token; weights as a fresh run has them, without DeepSpeed, on one device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    initialise(model, run.seed)
    model.to(device)
    prepare_layers(model, run.train)
    length, size = run.data.length, choose_block_size(run.seed, 0, block_sizes(run, 0))
    assert run.model.vocab_size is not None and run.model.mask_id is not None
    tokens = generator(run.seed, Purpose.SYNTHETIC).integers(0, run.model.vocab_size, (1, length))
    tokens[tokens == run.model.mask_id] = 0
    noise = None
    if run.objective.name != AR:
        slots = np.arange(run.objective.views)
        u = stratified_times(run.seed, 0, slots, run.objective.views, length // size)
        proposal = make_proposal(run.objective.schedule)
        noise = make_noise(u, mask_draws(run.seed, 0, slots, length), proposal, run.objective.weight)

    documents = torch.arange(length, device=device)[None] * 2 // length if run.data.document_mask else None

    with torch.autocast(device.type, torch.bfloat16, enabled=run.train.precision == "bf16"):
        x0, denoiser = torch.from_numpy(tokens), as_denoiser(model, size, documents)
        loss = training_loss(run.objective.name, denoiser, x0, noise, run.model.mask_id, device)
    loss.loss.backward()
    return float(loss.loss.detach())
