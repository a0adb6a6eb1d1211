"""How noisy training is: the variance of a batch's estimate of the bound, and of its gradient, over batches.

Var. NELBO is that of the batch estimate over M batches, sequences and noise both drawn anew, as in the paper's tables.
The variance of the gradient is the paper's eq. (10):

    1/(M-1) sum_m || g_m - mean g ||^2,    g_m = gradient of the training loss on batch m
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bd3_ds.checkpoint.export import Export
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import EvalConfig, RunConfig, block_size
from bd3_ds.data.pack import open_pack, read_token_counts
from bd3_ds.data.remote import fetch_facts
from bd3_ds.diffusion.clip_search import Spread, spread_sums
from bd3_ds.diffusion.frequency import power_at, rarity
from bd3_ds.diffusion.noise import make_noise, mask_draws, scored_places, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import Interval, make_proposal
from bd3_ds.model.dit import DiT, as_denoiser
from bd3_ds.runtime.rng import Purpose, generator, integer_seed


@dataclass(frozen=True)
class Variances:
    """Over `batches` batches of `sequences` sequences, in nats per scored token and their squares.

    nelbo: mean of the batch estimates. var_nelbo: their variance, var_nelbo_stderr its standard error (normal batches).
    var_block: variance of a block's estimate, within all batches; None for AR. var_gradient: eq. (10), None where not
    asked for.
    """

    batches: int
    sequences: int
    nelbo: float
    var_nelbo: float
    var_nelbo_stderr: float
    var_block: float | None
    var_gradient: float | None


def variances(
    model: DiT,
    run: RunConfig,
    tokens: Tensor,
    documents: Tensor | None = None,
    *,
    batches: int,
    sequences: int,
    at_once: int,
    gradient: bool,
    seed: int = 0,
    interval: Interval | None = None,
    step: int = 0,
    token_counts: np.ndarray | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Variances:
    """The variances of `run`'s objective under `model`, on batches drawn from tokens [N, L] of these documents [N, L].

    Batch m is `sequences` draws from the N; its noise is stratified over it as in training after `step` steps. As
    there, the loss is divided by the scored tokens of a mean sequence, the estimate of the bound by those of its batch.
    `at_once` sequences go through the network together. `interval` stands for the configured t_min and t_max.
    `token_counts` [V] are needed where the run masks by frequency. `progress` is called after every batch.
    """
    assert run.model.mask_id is not None
    device, size, length = next(model.parameters()).device, block_size(run), tokens.shape[1]
    scored = scored_places(tokens, documents).sum(1)  # [N]
    expected = float(scored.double().mean())
    moved = min(1.0, step / run.train.total_steps)
    proposal = None if OBJECTIVES[run.objective.name].causal else make_proposal(run.objective.schedule, moved, interval)
    wishes = None if token_counts is None else rarity(token_counts) ** power_at(run.objective.frequency, step)
    noise_seed = integer_seed(seed, Purpose.VARIANCE)
    estimates: list[float] = []
    blocks = torch.zeros(3, dtype=torch.float64, device=device)
    weights = list(model.parameters()) if gradient else []
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in weights]
    squares = torch.zeros((), dtype=torch.float64, device=device)

    for number in range(batches):
        rows = generator(seed, Purpose.VARIANCE, number).integers(len(tokens), size=sequences)
        model.zero_grad(set_to_none=True)
        estimate = 0.0
        for start in range(0, sequences, at_once):
            slots = np.arange(start, min(start + at_once, sequences))
            chosen = torch.from_numpy(rows[slots])
            x0, parts = tokens[chosen], None if documents is None else documents[chosen]
            denoiser = as_denoiser(model, size, None if parts is None else parts.to(device))
            noise = None
            if proposal is not None:
                u = stratified_times(noise_seed, number, slots, sequences, length // size)
                draws = mask_draws(noise_seed, number, slots, length)
                wish = None if wishes is None else wishes[x0]
                noise = make_noise(u, draws, proposal, run.objective.weight, wish, parts)
            with torch.set_grad_enabled(gradient):
                loss = training_loss(
                    run.objective.name, denoiser, x0, noise, run.model.mask_id, device, parts, expected
                )
            share = len(slots) / sequences
            estimate += float(loss.nelbo) * share
            if noise is not None and loss.block_nats is not None:
                blocks += spread_sums(loss.block_nats, noise.bound_weight.to(device))
            if gradient:
                (loss.loss * share).backward()
        estimates.append(estimate * (sequences * expected / max(1.0, float(scored[rows].sum()))))
        for total, parameter in zip(mean, weights, strict=True):
            if parameter.grad is not None:
                total += parameter.grad.double() / batches
                squares += parameter.grad.double().square().sum()
        progress()
    model.zero_grad(set_to_none=True)
    variance = float(np.var(estimates, ddof=1))
    spread = float(squares) - batches * sum(float(total.square().sum()) for total in mean)
    return Variances(
        batches=batches,
        sequences=sequences,
        nelbo=float(np.mean(estimates)),
        var_nelbo=variance,
        var_nelbo_stderr=variance * math.sqrt(2 / (batches - 1)),
        var_block=None if proposal is None else Spread.of(blocks).variance,
        var_gradient=spread / (batches - 1) if gradient else None,
    )


def variances_of(
    model: DiT, export: Export, directory: str, wanted: EvalConfig, progress: Callable[[], None]
) -> dict[str, float | None]:
    """The variances that an evaluation worker puts on record for a set, by their names there."""
    run, pack, counts = export.run, open_pack(directory), None
    if run.objective.frequency.power > 0:
        counts = read_token_counts(fetch_facts(run.data.train, run.data.cache))
    documents = pack.all_documents(wanted.max_chunks, apart=run.data.document_mask)
    measured = variances(
        model,
        run,
        torch.from_numpy(pack.all_tokens(wanted.max_chunks)),
        None if documents is None else torch.from_numpy(documents),
        batches=wanted.variance_batches,
        sequences=wanted.batch,
        at_once=wanted.batch,
        gradient=True,
        step=export.step,
        progress=progress,
        token_counts=counts,
    )
    return {key: getattr(measured, key) for key in ("var_nelbo", "var_block", "var_gradient")}
