"""One optimizer step: micro-batches, noise by place, loss, backward, update, average."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bd3_ds.config.schema import AR, RunConfig, block_size
from bd3_ds.data.loader import MicroBatch
from bd3_ds.diffusion.noise import mask_draws, stratified_times
from bd3_ds.diffusion.objective import BINS, Noise, training_loss
from bd3_ds.diffusion.schedule import make_schedule
from bd3_ds.runtime.rng import Purpose, integer_seed
from bd3_ds.runtime.world import World
from bd3_ds.train.ema import Ema
from bd3_ds.train.engine import Engine
from bd3_ds.train.lr import learning_rate


@dataclass(frozen=True)
class StepResult:
    """Means over the global batch, the same on every rank; loss and nelbo in nats per scored token.

    `nats_by_rate` is the mean -log p(x0) of a masked token by its block's masking rate, in BINS equal bins; nan where
    a bin saw none.
    """

    step: int
    loss: float
    nelbo: float
    nats_by_rate: list[float]
    grad_norm: float
    lr: float
    seconds: float
    waited: float
    stop_asked: bool


class Stepper:
    """All that is fixed from step to step."""

    def __init__(self, run: RunConfig, world: World, engine: Engine, ema: Ema, mask_id: int):
        self.run = run
        self.world = world
        self.engine = engine
        self.ema = ema
        self.mask_id = mask_id
        self.schedule = make_schedule(run.objective.schedule)
        self.block_size = block_size(run)
        self.accumulation = run.train.global_batch // (run.train.micro_batch * world.size)

    def step(self, batches: Iterator[MicroBatch], done: int, stop_asked: bool) -> StepResult:
        """The update after `done` steps; `stop_asked` on any rank reaches all through the result."""
        start = time.perf_counter()
        lr = learning_rate(self.run.optim, done, self.run.train.total_steps)
        totals = torch.zeros(3 + 2 * BINS, device=self.world.device, dtype=torch.float64)
        waited = 0.0
        for micro_step in range(self.accumulation):
            batch = next(batches)
            waited += batch.waited
            torch.manual_seed(integer_seed(self.run.seed, Purpose.DROPOUT, done, micro_step, self.world.rank))
            loss = training_loss(
                self.run.objective.name,
                partial(self._denoise, self._documents(batch)),
                batch.tokens.to(self.world.device, non_blocking=True),
                self._noise(done, batch),
                self.schedule,
                self.mask_id,
            )
            self.engine.backward(loss.loss)
            self.engine.step(lr)
            totals[:2] += torch.stack([loss.loss.detach(), loss.nelbo]) / (self.accumulation * self.world.size)
            totals[3:] += torch.cat([loss.bin_nats, loss.bin_masked])
        self.ema.update()
        totals[2] = float(stop_asked)
        values = self.world.sum(totals).tolist()
        nats, masked = values[3 : 3 + BINS], values[3 + BINS :]
        return StepResult(
            step=done + 1,
            loss=values[0],
            nelbo=values[1],
            nats_by_rate=[n / m if m else float("nan") for n, m in zip(nats, masked, strict=True)],
            grad_norm=self.engine.grad_norm(),
            lr=lr,
            seconds=time.perf_counter() - start,
            waited=waited,
            stop_asked=values[2] > 0,
        )

    def _denoise(
        self, documents: Tensor | None, x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor
    ) -> Tensor:
        return self.engine(x_t, x0, block_size=self.block_size, sigma=sigma, at=at, documents=documents)

    def _documents(self, batch: MicroBatch) -> Tensor | None:
        return None if batch.documents is None else batch.documents.to(self.world.device, non_blocking=True)

    def _noise(self, done: int, batch: MicroBatch) -> Noise | None:
        if self.run.objective.name == AR:
            return None
        seed, length = self.run.seed, self.run.data.length
        u = stratified_times(seed, done, batch.slots, self.run.train.global_batch, length // self.block_size)
        draws = mask_draws(seed, done, batch.slots, length)
        return Noise(u.to(self.world.device), draws.to(self.world.device))
