"""The clip search of a run: candidates' variances, computed on all ranks, and the interval that all of them adopt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from bd3_ds.config.schema import block_sizes
from bd3_ds.data.pack import Pack
from bd3_ds.diffusion.clip_search import ENOUGH, HELD_OUT_BINS, binned, candidates, least, within_variance
from bd3_ds.diffusion.noise import make_noise
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import Interval, base_schedule, make_proposal
from bd3_ds.runtime.host_to_device import send
from bd3_ds.runtime.rng import Purpose, generator
from bd3_ds.train.held_out import HeldOut
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import Stepper


class ClipSearch:
    """`held_out` is the pack that the grid method searches on; the moments method needs none."""

    def __init__(self, stepper: Stepper, held_out: Pack | None):
        self.stepper = stepper
        self.run = run = stepper.run
        self._held_out: HeldOut | None = None
        if held_out is not None:
            self._held_out = HeldOut(held_out, run.objective.clip_search.sequences, run.data.document_mask)

    def search(self, state: TrainState) -> tuple[TrainState, list[str], dict[str, float]]:
        """The state with a new interval for each block size being trained, a line about each, and scalars to plot."""
        lines: list[str] = []
        scalars: dict[str, float] = {}
        run = self.run
        progress = state.step / run.train.total_steps
        for size in block_sizes(run, state.step):
            tried = candidates(run.objective, size, progress)
            clip = state.clip(size)
            if run.objective.clip_search.method == "moments":
                clip = replace(clip, moments=clip.moments.settled())
                schedule = base_schedule(run.objective.schedule, progress)
                variances = {each: clip.moments.variance(schedule, each) for each in tried}
            else:
                variances = self._forward(tried, size, state.step, progress)
            chosen = least(variances)
            if chosen is None:
                lines.append(f"clip search, block size {size}: training has not shown enough rates yet")
            else:
                clip = replace(clip, interval=chosen)
                lines.append(
                    f"clip search, block size {size}: t in [{chosen[0]:g}, {chosen[1]:g}], variance "
                    f"{variances[chosen]:.4g}; whole interval {variances[tried[0]]:.4g}; {len(tried)} candidates"
                )
                scalars |= {
                    f"clip/{size}/t_min": chosen[0],
                    f"clip/{size}/t_max": chosen[1],
                    f"clip/{size}/variance": variances[chosen],
                    f"clip/{size}/variance_whole": variances[tried[0]],
                }
            state = state.with_clip(size, clip)
        return state, lines, scalars

    @torch.no_grad()
    def _forward(self, tried: list[Interval], size: int, step: int, progress: float) -> dict[Interval, float]:
        """Variance of a block's estimate under each interval, with the present weights and common random numbers."""
        assert self._held_out is not None
        run, world, engine = self.run, self.stepper.world, self.stepper.engine
        micro, length = run.train.micro_batch, run.data.length
        reader, readers = world.rank // run.train.sequence_parallel, world.size // run.train.sequence_parallel
        per_rank = len(self._held_out) // (micro * readers) * micro
        blocks, total = length // size, per_rank * readers * (length // size)
        rng = generator(run.seed, Purpose.CLIP_SEARCH, step, size)
        strata = (rng.permutation(total) + rng.random(total)).reshape(-1, blocks) / total  # [N, B]
        bins = max(1, min(HELD_OUT_BINS, total // ENOUGH))
        sums = torch.zeros(len(tried), 3, bins, dtype=torch.float64, device=world.device)
        engine.module.eval()
        for start in range(0, per_rank, micro):
            rows = np.arange(start, start + micro) * readers + reader
            tokens, documents = self._held_out.rows(rows)
            score = self.stepper.masking_score(tokens, step)
            denoiser = self.stepper.denoiser(size, documents)
            u = torch.from_numpy(strata[rows])
            place = send(u, world.device)
            masks = [generator(run.seed, Purpose.CLIP_SEARCH, step, size, 1 + int(row)).random(length) for row in rows]
            draws = torch.from_numpy(np.stack(masks))
            for number, interval in enumerate(tried):
                proposal = make_proposal(run.objective.schedule, progress, interval)
                noise = make_noise(u, draws, proposal, run.objective.weight, score, documents)
                loss = training_loss(
                    run.objective.name, denoiser, tokens, noise, self.stepper.mask_id, world.device, documents
                )
                assert loss.block_nats is not None and loss.block_weight is not None
                sums[number] += binned(loss.block_nats, loss.block_weight, place, bins)
        engine.module.train()
        self.stepper.all_reduce(sums)
        return {interval: within_variance(each.cpu()) for interval, each in zip(tried, sums, strict=True)}
