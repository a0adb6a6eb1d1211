"""One optimizer step: micro-batches, noise, loss, backward, update, moving average."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd3_ds.config.check import accumulation_steps
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_sizes
from bd3_ds.data.micro_batch import MicroBatch
from bd3_ds.diffusion.clip_search import moment_sums
from bd3_ds.diffusion.frequency import power_at, rarity
from bd3_ds.diffusion.noise import (
    Noise,
    choose_block_size,
    make_noise,
    mask_draws,
    scored_positions,
    stratified_times,
)
from bd3_ds.diffusion.objective import Loss, training_loss
from bd3_ds.diffusion.proposal import ExploringProposal, Interval, RateProposal, base_schedule, make_proposal
from bd3_ds.model.dit import as_denoiser
from bd3_ds.parallel.sequence import SequenceParallel
from bd3_ds.runtime.host_to_device import send
from bd3_ds.runtime.rng import Purpose, integer_seed
from bd3_ds.runtime.world import World
from bd3_ds.train.ema import Ema
from bd3_ds.train.engine import Engine
from bd3_ds.train.guards import is_spike
from bd3_ds.train.lr import learning_rate
from bd3_ds.train.state import TrainState
from bd3_ds.train.step_sums import StepSums, Summed


@dataclass(frozen=True)
class StepResult:
    """Means over the global batch, the same on every rank; loss and nelbo in nats per scored token of the batch.

    nats_by_rate: mean -log p(x0) of a masked token by its block's masking rate, in BINS equal bins; nan where a bin saw
    none. masked_share: of the scored tokens, the share that is masked; head_tokens: positions at which the head ran,
    of all views. block_variance: variance over the batch's blocks of their estimates of the bound. moments: the batch's
    sums where the clip search goes by moments, else None. interval: that of the times drawn. AR has none of the three.
    skipped: there was no update, and numbers may not be finite. ids: this rank's samples.
    """

    step: int
    loss: float
    nelbo: float
    nelbo_is_bound: bool
    nats_by_rate: list[float]
    masked_share: float
    head_tokens: int
    block_size: int
    interval: Interval | None
    block_variance: float | None
    moments: Tensor | None
    grad_norm: float
    lr: float
    seconds: float
    waited: float
    skipped: bool
    ids: list[int]
    stop_asked: bool
    still_saving: bool


class Stepper:
    """Runs optimizer steps; `token_counts` [V] are needed for frequency-informed masking.

    `scored_tokens` are those of a mean sequence, L - 1 by default, fewer where the packs are padded. The loss of a step
    is divided by this constant, not by the tokens of its own batch, so that every token of the run has the same weight.
    """

    def __init__(
        self,
        run: RunConfig,
        world: World,
        engine: Engine,
        ema: Ema,
        mask_id: int,
        token_counts: np.ndarray | None,
        scored_tokens: float | None = None,
        sequence: SequenceParallel | None = None,
    ):
        self.run = run
        self.world = world
        self.engine = engine
        self.ema = ema
        self.mask_id = mask_id
        self.scored_tokens = run.data.length - 1 if scored_tokens is None else scored_tokens
        self.sequence = sequence
        self.accumulation = accumulation_steps(run, world.size)
        self._rarity = None if token_counts is None else rarity(token_counts)

    def proposal(self, state: TrainState, block_size: int) -> RateProposal:
        """What the step after `state` draws masking rates from."""
        schedule, search = self.run.objective.schedule, self.run.objective.clip_search
        progress = state.step / self.run.train.total_steps
        found = state.clip(block_size).interval
        whole = make_proposal(schedule, progress)
        if found is None or found == (schedule.t_min, schedule.t_max):
            return whole
        clipped = make_proposal(schedule, progress, found)
        return ExploringProposal(clipped, whole, search.explore) if search.method == "moments" else clipped

    def step(
        self, batches: Iterator[MicroBatch], state: TrainState, stop_asked: bool = False, still_saving: bool = False
    ) -> StepResult:
        """The update after `state`; `stop_asked` and `still_saving` on any rank reach all through the result."""
        start = time.perf_counter()
        run, done = self.run, state.step
        lr = learning_rate(run.optim, done, run.train.total_steps)
        size = choose_block_size(run.seed, done, block_sizes(run, done))
        proposal = None if OBJECTIVES[run.objective.name].causal else self.proposal(state, size)
        schedule = base_schedule(run.objective.schedule, done / run.train.total_steps)
        keeps_moments = proposal is not None and run.objective.clip_search.method == "moments"
        sums = StepSums(self.world.device, keeps_moments)
        waited, scored = 0.0, 0
        micro_batches = self.accumulation * self.world.size // run.train.sequence_parallel  # of all ranks
        ids: list[int] = []
        for micro_step in range(self.accumulation):
            batch = next(batches)
            waited += batch.waited
            ids += batch.ids
            scored += int(scored_positions(batch.tokens, batch.documents).sum())
            torch.manual_seed(integer_seed(run.seed, Purpose.DROPOUT, done, micro_step, self.world.rank))
            noise = self._noise(done, batch, size, proposal)
            loss = self._loss(batch, noise, size)
            self.engine.backward(loss.loss)
            sums.add(loss, micro_batches)
            last = micro_step == self.accumulation - 1
            self.engine.step(lr, refuse=last and self._is_refused(sums.nelbo, scored, state))
            if keeps_moments and noise is not None and loss.block_nats is not None and loss.block_weight is not None:
                sums.moments += moment_sums(loss.block_nats, send(noise.rate, self.world.device), schedule)
        if not self.engine.skipped:
            self.ema.update()
        summed = Summed.unpack(self.all_reduce(sums.pack(scored, stop_asked, still_saving)).cpu())
        per_token = self._per_token(summed.scored)
        configured = (run.objective.schedule.t_min, run.objective.schedule.t_max)
        return StepResult(
            step=done + 1,
            loss=summed.loss * per_token,
            nelbo=summed.nelbo * per_token,
            nelbo_is_bound=proposal is None or ((proposal.covers_all or size == 1) and self._rarity is None),
            nats_by_rate=[n / m if m else math.nan for n, m in zip(summed.nats, summed.masked, strict=True)],
            masked_share=sum(summed.masked) / max(1.0, summed.scored * run.objective.views),
            head_tokens=round(sum(summed.masked)),
            block_size=size,
            interval=None if proposal is None else state.clip(size).interval or configured,
            block_variance=None if proposal is None else summed.spread.variance,
            moments=summed.moments if keeps_moments else None,
            grad_norm=self.engine.grad_norm(),
            lr=lr,
            seconds=time.perf_counter() - start,
            waited=waited,
            skipped=self.engine.skipped,
            ids=ids if self.world.rank % self.run.train.sequence_parallel == 0 else [],
            stop_asked=summed.stop_asked,
            still_saving=summed.still_saving,
        )

    def _loss(self, batch: MicroBatch, noise: Noise | None, size: int) -> Loss:
        return training_loss(
            self.run.objective.name,
            self.denoiser(size, batch.documents),
            batch.tokens,
            noise,
            self.mask_id,
            self.world.device,
            batch.documents,
            self.scored_tokens,
        )

    def _per_token(self, scored: float) -> float:
        """From nats per expected token to nats per token that the batch held; 1 exactly where nothing is padding."""
        return self.run.train.global_batch * self.scored_tokens / max(1.0, scored)

    def _is_refused(self, nelbo: Tensor, scored: int, state: TrainState) -> bool:
        """Whether the batch's loss is a spike that is to be skipped; all ranks wait for it only where that is so."""
        guards = self.run.guards
        if guards.spike != "skip":
            return False
        known = self.all_reduce(torch.stack([nelbo, torch.full_like(nelbo, scored)])).tolist()
        return is_spike(state.recent, known[0] * self._per_token(known[1]), guards.spike_sigmas)

    def denoiser(self, size: int, documents: Tensor | None) -> Any:
        """The network in training as the objectives call it, at block size `size`."""
        denoise = as_denoiser(self.engine, size, None if documents is None else send(documents, self.world.device))
        return denoise if self.sequence is None else self.sequence.denoiser(denoise)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all sequences, in place; ranks that share a sequence all contribute its values."""
        return self.world.all_reduce(tensor).div_(self.run.train.sequence_parallel)

    def _noise(self, done: int, batch: MicroBatch, size: int, proposal: RateProposal | None) -> Noise | None:
        if proposal is None:
            return None
        seed, length, views = self.run.seed, self.run.data.length, self.run.objective.views
        slots = (batch.slots[:, None] * views + np.arange(views)).flatten()  # [m K], the views of a sequence together
        u = stratified_times(seed, done, slots, self.run.train.global_batch * views, length // size)
        draws = mask_draws(seed, done, slots, length)
        score = self.masking_score(batch.tokens.repeat_interleave(views, dim=0), done)
        documents = None if batch.documents is None else batch.documents.repeat_interleave(views, dim=0)
        return make_noise(u, draws, proposal, self.run.objective.weight, score, documents)

    def masking_score(self, tokens: Tensor, step: int) -> Tensor | None:
        """How much each of tokens [b, L] is to be masked after `step` steps, relative to others; None: all alike."""
        if self._rarity is None:
            return None
        return self._rarity[tokens] ** power_at(self.run.objective.frequency, step)
