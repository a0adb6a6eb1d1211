"""A forward and backward pass on one sequence of random tokens: what cannot work fails here, in seconds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import psutil
import torch

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_sizes
from bd3_ds.diffusion.noise import choose_block_size, make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.model.build import dit_config, initialise
from bd3_ds.model.dit import DiT, as_denoiser
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.model.flops import recomputed_flops_per_sequence, training_flops_per_sequence
from bd3_ds.parallel.apply import prepare_layers
from bd3_ds.planning.activations import head_bytes, layers_bytes, pass_of, working_bytes
from bd3_ds.planning.memory import parameter_count
from bd3_ds.runtime.gpus import GIB
from bd3_ds.runtime.peak_flops import peak_flops
from bd3_ds.runtime.rng import Purpose, generator

LONGEST = 60.0  # estimated seconds up to which a dry step is taken without being asked for
SHARE = 0.2  # of the peak rate that one sequence reaches, a cautious guess for the estimate


def try_dry_step(run: RunConfig, even_if_long: bool) -> None:
    """Take the dry step, having said what it costs, or say why it is not taken."""
    network = dit_config(run.model, run.objective.name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = sequence_flops(network, run)
    seconds = flops / (SHARE * peak_flops(device, run.train.precision))
    work = f"{flops / 1e12:,.1f} TFLOP" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP"
    cost = f"{work}, about {max(1, round(seconds)):,} s here"
    needed, free = needed_bytes(network, run, device), _free_bytes(device)
    if needed > free:
        print(f"no dry step: it needs about {needed / GIB:,.1f} GiB, this machine has {free / GIB:,.1f} GiB free")
        return
    if seconds > LONGEST and not even_if_long:
        print(f"no dry step: {cost}; --dry-step takes it all the same")
        return
    print(f"taking one dry step on one sequence ({cost}); --no-dry-step leaves it out", flush=True)
    loss = dry_step(DiT(network), run)
    print(f"dry step: loss {loss:.4f} nats a token (a new model starts near ln V = {math.log(network.vocab_size):.2f})")


def sequence_flops(network: DiTConfig, run: RunConfig) -> float:
    """Forward and backward pass on one sequence at the first block size, with what is computed again."""
    name, length, views = run.objective.name, run.data.length, run.objective.views
    size, mode = choose_block_size(run.seed, 0, block_sizes(run, 0)), run.train.activation_checkpointing
    masked = 1.0 if OBJECTIVES[name].causal else make_proposal(run.objective.schedule).mean_rate
    once = training_flops_per_sequence(network, name, length, size, masked, views)
    return once + recomputed_flops_per_sequence(network, name, length, size, views, mode)


def needed_bytes(network: DiTConfig, run: RunConfig, device: torch.device) -> int:
    """Weights and gradients in fp32 and as much again, and what one sequence keeps for the backward pass."""
    one = dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch=1, sequence_parallel=1))
    size = choose_block_size(run.seed, 0, block_sizes(run, 0))
    given = pass_of(one, network, size, 0, device.type == "cuda")
    mode = run.train.activation_checkpointing
    held = layers_bytes(given, mode) + head_bytes(given) + working_bytes(given, mode)
    return 16 * parameter_count(network) + held


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


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
    if not OBJECTIVES[run.objective.name].causal:
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
