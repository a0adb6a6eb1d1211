"""Validation: the NELBO on held-out text during training, with the current weights (not their average).

The training loss varies with the noise of each step, and is no bound where rates are clipped or the loss is weighted.
This is the NELBO that `run.py evaluate` gives for the same weights: the same sequences, views and
draws, so that two points of a run, or of two runs, differ only by their weights. It uses no random numbers of training,
so that the run is the same with it and without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig
from bd3_ds.data.pack import open_pack
from bd3_ds.diffusion.bounds import Answer, bound_under
from bd3_ds.diffusion.likelihood import Bound, Estimator, Texts
from bd3_ds.diffusion.noise import scored_positions
from bd3_ds.runtime.errors import UserError
from bd3_ds.train.exporting import scored_block_size
from bd3_ds.train.held_out import HeldOut
from bd3_ds.train.step import Stepper

SEED = 0  # that of `run.py evaluate`


@dataclass(frozen=True)
class Validated:
    """The bound on a set after `step` steps: nats per scored token and their standard error, the same on all ranks."""

    step: int
    set: str
    estimator: str
    views: int
    block_size: int
    nelbo: float
    stderr: float
    tokens: int
    sequences: int

    @property
    def ppl(self) -> float:
        """exp(nelbo), the perplexity."""
        return math.exp(min(self.nelbo, 700.0))

    def record(self, seconds: float) -> dict[str, Any]:
        """A line of records/validation.jsonl; what is not finite is null."""
        known = math.isfinite(self.nelbo)
        return {
            "step": self.step,
            "set": self.set,
            "estimator": self.estimator,
            "views": self.views,
            "block_size": self.block_size,
            "nelbo": self.nelbo if known else None,
            "stderr": self.stderr if math.isfinite(self.stderr) else None,
            "ppl": self.ppl if known else None,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "seconds": seconds,
        }

    def scalars(self) -> dict[str, float]:
        """Points in TensorBoard."""
        return {f"val/{self.set}/nelbo": self.nelbo, f"val/{self.set}/ppl": self.ppl}

    def __str__(self) -> str:
        return (
            f"nelbo {self.nelbo:.4f} ± {self.stderr:.4f} nats/token, perplexity {self.ppl:.2f} "
            f"({self.set}, {self.sequences:,} sequences, {self.estimator})"
        )


def validation_set(run: RunConfig) -> str | None:
    """The name in eval.sets that the run is validated on; None where it is not."""
    if not run.train.validate_every or not run.eval.sets:
        return None
    return run.train.validate_set or next(iter(run.eval.sets))


class Validation:
    """Holds the sequences; `run` is called on all ranks together. Raises UserError for a set with nothing to score."""

    def __init__(self, stepper: Stepper):
        self._stepper = stepper
        self._run = run = stepper.run
        self.set = validation_set(run)
        if self.set is None:
            return
        directory = run.eval.sets[self.set]
        self._held_out = HeldOut(open_pack(directory), run.train.validate_sequences, run.data.document_mask)
        self._scored = int(scored_positions(self._held_out.tokens, self._held_out.documents).sum())
        if self._scored == 0:
            raise UserError(
                f"the first {len(self._held_out)} sequences of eval.sets.{self.set}={directory} have nothing to score: "
                "all but the given first tokens is padding; raise train.validate_sequences, or name another "
                "train.validate_set"
            )

    def is_due(self, step: int, last: bool) -> bool:
        """Whether there is a value after `step` steps; the last step always gets one."""
        every = self._run.train.validate_every
        if not every or self.set is None:
            return False
        return last or step % every == 0

    @torch.no_grad()
    def run(self, step: int) -> Validated:
        """The bound after `step` steps, each rank scoring its part; the noise depends on the sequence only."""
        run, stepper, world = self._run, self._stepper, self._stepper.world
        assert self.set is not None
        size = scored_block_size(run, step)
        objective = OBJECTIVES[run.objective.name]
        estimator = "exact" if size == 1 and objective.can_be_exact else objective.sampled_estimator
        views = 1 if estimator == "exact" else run.eval.views
        together = max(1, run.train.micro_batch // views)  # so that no pass holds more than training's do
        how = Estimator(estimator, views, SEED, at_once=together)
        share = run.train.sequence_parallel
        reader, readers = world.rank // share, world.size // share
        batches = -(-len(self._held_out) // together)
        sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        stepper.engine.module.eval()
        for turn in range(-(-batches // readers)):
            number = turn * readers + reader
            # Under ZeRO-3 every rank makes every pass: one without a batch of its own repeats the last and drops it.
            first = min(number, batches - 1) * together
            bound = self._bound(slice(first, first + together), first, size, how)
            if number < batches:
                by_sequence = bound.nelbo.double().sum(1)
                sums += torch.stack([by_sequence.sum(), bound.variance.double().sum(), by_sequence.square().sum()])
        stepper.engine.module.train()
        nats, variance, squares = stepper.all_reduce(sums).tolist()
        sequences = len(self._held_out)
        if estimator != "exact" and views == 1 and sequences > 1:
            # One view gives no estimate of its own error; the variance over sequences, text included, is an upper one.
            variance = sequences * max(0.0, squares - nats**2 / sequences) / (sequences - 1)
        return Validated(
            step=step,
            set=self.set,
            estimator=estimator,
            views=views,
            block_size=size,
            nelbo=nats / self._scored,
            stderr=math.sqrt(variance) / self._scored if variance >= 0 else math.nan,
            tokens=self._scored,
            sequences=sequences,
        )

    def _bound(self, rows: slice, first: int, size: int, estimator: Estimator) -> Bound:
        """The Bound of these sequences, the first of which has this number."""
        run, stepper = self._run, self._stepper
        tokens, documents = self._held_out.rows(rows)
        denoise = stepper.denoiser(size, documents)
        device = stepper.world.device
        texts = Texts(tokens, documents, first_row=first).to(device)

        def network(x0: Tensor | None) -> Answer:
            # All views beside one clean pass, as in training with several views.
            return lambda x_t, sigma, at, read: denoise(x_t.flatten(0, -2), x0, sigma=sigma, at=at, read=read)

        return bound_under(run.objective.name, network, texts, size, stepper.mask_id, estimator)
