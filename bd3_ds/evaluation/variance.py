"""The variance of the training estimate and of its gradient, over batches.

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
from bd3_ds.data.data_facts import read_pack_facts
from bd3_ds.diffusion.clip_search import Spread, spread_sums
from bd3_ds.diffusion.frequency import power_at, rarity
from bd3_ds.diffusion.likelihood import Texts
from bd3_ds.diffusion.noise import Noise, make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import Interval, make_proposal
from bd3_ds.evaluation.perplexity import read_texts
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


@dataclass(frozen=True)
class BatchPlan:
    """Which batches a variance is taken over.

    batches: how many, each of `sequences` draws from the texts, by `seed`. at_once: sequences of a forward pass.
    gradient: whether to take the variance of the gradient too, by a backward pass for each forward pass.
    """

    batches: int
    sequences: int
    at_once: int
    gradient: bool = False
    seed: int = 0


def variances(
    model: DiT,
    run: RunConfig,
    texts: Texts,
    plan: BatchPlan,
    *,
    interval: Interval | None = None,
    step: int = 0,
    token_counts: np.ndarray | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Variances:
    """The variances of `run`'s objective under `model`, on batches drawn from N texts on the CPU.

    A batch's noise is stratified over it as in training after `step` steps. As there, the loss is divided by the scored
    tokens of a mean sequence, the estimate of the bound by those of its batch. `interval` stands for the configured
    t_min and t_max. `token_counts` [V] are needed where the run masks by frequency. `progress` is called after every
    batch.
    """
    scored = texts.scored_positions().sum(1)  # [N]
    noise_of = _noise_source(run, texts, plan, step, interval, token_counts)
    batch = _Batch(model, run, plan, float(scored.double().mean()))
    estimates: list[float] = []
    for number in range(plan.batches):
        rows = generator(plan.seed, Purpose.VARIANCE, number).integers(len(texts), size=plan.sequences)
        estimate = batch.estimate(texts, rows, number, noise_of)
        estimates.append(estimate * (plan.sequences * batch.expected / max(1.0, float(scored[rows].sum()))))
        progress()
    variance = float(np.var(estimates, ddof=1))
    return Variances(
        batches=plan.batches,
        sequences=plan.sequences,
        nelbo=float(np.mean(estimates)),
        var_nelbo=variance,
        var_nelbo_stderr=variance * math.sqrt(2 / (plan.batches - 1)),
        var_block=None if noise_of is None else Spread.of(batch.blocks).variance,
        var_gradient=batch.gradients.variance() if batch.gradients is not None else None,
    )


# Noise for the rows [n] of the texts that stand at `slots` [n] of batch `number`.
_NoiseSource = Callable[[int, np.ndarray, Tensor], Noise]


def _noise_source(
    run: RunConfig,
    texts: Texts,
    plan: BatchPlan,
    step: int,
    interval: Interval | None,
    token_counts: np.ndarray | None,
) -> _NoiseSource | None:
    """Noise as in training after `step` steps; None for AR."""
    if OBJECTIVES[run.objective.name].causal:
        return None
    blocks, length = texts.x0.shape[1] // block_size(run), texts.x0.shape[1]
    proposal = make_proposal(run.objective.schedule, min(1.0, step / run.train.total_steps), interval)
    scores = None if token_counts is None else rarity(token_counts) ** power_at(run.objective.frequency, step)
    seed = integer_seed(plan.seed, Purpose.VARIANCE)

    def noise_of(number: int, slots: np.ndarray, rows: Tensor) -> Noise:
        u = stratified_times(seed, number, slots, plan.sequences, blocks)
        draws = mask_draws(seed, number, slots, length)
        documents = None if texts.documents is None else texts.documents[rows]
        score = None if scores is None else scores[texts.x0[rows]]
        return make_noise(u, draws, proposal, run.objective.weight, score, documents)

    return noise_of


class _Batch:
    """One batch after the other through the network.

    expected: scored tokens of a mean sequence. blocks: the running sums of `spread_sums`. gradients: None where not
    asked for.
    """

    def __init__(self, model: DiT, run: RunConfig, plan: BatchPlan, expected: float):
        self._model, self._run, self._plan = model, run, plan
        self._device = next(model.parameters()).device
        self.expected = expected
        self.blocks = torch.zeros(3, dtype=torch.float64, device=self._device)
        self.gradients = _Gradients(model, plan.batches) if plan.gradient else None

    def estimate(self, texts: Texts, rows: np.ndarray, number: int, noise_of: _NoiseSource | None) -> float:
        """The training loss's estimate of the bound on the texts at `rows`, nats per expected token."""
        run, plan = self._run, self._plan
        assert run.model.mask_id is not None
        self._model.zero_grad(set_to_none=True)
        estimate = 0.0
        for start in range(0, plan.sequences, plan.at_once):
            slots = np.arange(start, min(start + plan.at_once, plan.sequences))
            chosen = torch.from_numpy(rows[slots])
            documents = None if texts.documents is None else texts.documents[chosen]
            noise = None if noise_of is None else noise_of(number, slots, chosen)
            denoiser = as_denoiser(
                self._model, block_size(run), None if documents is None else documents.to(self._device)
            )
            with torch.set_grad_enabled(plan.gradient):
                loss = training_loss(
                    run.objective.name,
                    denoiser,
                    texts.x0[chosen],
                    noise,
                    run.model.mask_id,
                    self._device,
                    documents,
                    self.expected,
                )
            share = len(slots) / plan.sequences
            estimate += float(loss.nelbo) * share
            if noise is not None and loss.block_nats is not None:
                self.blocks += spread_sums(loss.block_nats, noise.bound_weight.to(self._device))
            if plan.gradient:
                (loss.loss * share).backward()
        if self.gradients is not None:
            self.gradients.add()
        self._model.zero_grad(set_to_none=True)
        return estimate


class _Gradients:
    """The gradients of batches, as their mean and the sum of their squares."""

    def __init__(self, model: DiT, batches: int):
        self._weights, self._batches = list(model.parameters()), batches
        self._mean = [torch.zeros_like(p, dtype=torch.float64) for p in self._weights]
        self._squares = torch.zeros((), dtype=torch.float64, device=self._weights[0].device)

    def add(self) -> None:
        """Take in the gradient that the parameters hold."""
        for mean, parameter in zip(self._mean, self._weights, strict=True):
            if parameter.grad is not None:
                mean += parameter.grad.double() / self._batches
                self._squares += parameter.grad.double().square().sum()

    def variance(self) -> float:
        """Eq. (10) over all batches."""
        spread = float(self._squares) - self._batches * sum(float(mean.square().sum()) for mean in self._mean)
        return spread / (self._batches - 1)


def variances_of(
    model: DiT, export: Export, directory: str, wanted: EvalConfig, progress: Callable[[], None]
) -> dict[str, float | None]:
    """The variances that an evaluation worker puts on record for a set, by their names there."""
    run, counts = export.run, None
    if run.objective.frequency.power > 0:
        counts = read_pack_facts(run.data.train, run.data.cache, check_files=False).token_counts
    texts = read_texts(directory, wanted.max_chunks, apart=run.data.document_mask)
    plan = BatchPlan(wanted.variance_batches, wanted.batch, wanted.batch, gradient=True)
    measured = variances(model, run, texts, plan, step=export.step, token_counts=counts, progress=progress)
    return {key: getattr(measured, key) for key in ("var_nelbo", "var_block", "var_gradient")}
