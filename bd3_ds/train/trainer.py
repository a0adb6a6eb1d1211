"""The Trainer and its loop. Start reading here; each line's detail is one file away."""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_ds.checkpoint.export import export_name
from bd3_ds.checkpoint.store import Saver
from bd3_ds.config.schema import RunConfig
from bd3_ds.data.loader import Loader
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import write_json
from bd3_ds.runtime.log import RunLog
from bd3_ds.runtime.run_dir import FINISHED, INCIDENTS
from bd3_ds.runtime.world import World
from bd3_ds.train.clip_search import ClipSearch
from bd3_ds.train.closing import closing_lines
from bd3_ds.train.earlier import CONFIGURATION
from bd3_ds.train.ema import Ema
from bd3_ds.train.engine import Engine
from bd3_ds.train.exporting import write_run_export
from bd3_ds.train.guards import StopRequest, Watchdog, is_spike
from bd3_ds.train.meter import Meter
from bd3_ds.train.reporting import finite, progress_bar, report
from bd3_ds.train.state import SKIPPED_OF, TrainState
from bd3_ds.train.step import Stepper, StepResult
from bd3_ds.train.validation import Validated, Validation


@dataclass
class Trainer:
    """A run ready to step: `build` makes it, fresh or exactly where the last start stopped.

    started: time.perf_counter() when this start began.
    """

    run: RunConfig
    world: World
    engine: Engine
    ema: Ema
    stepper: Stepper
    clip_search: ClipSearch
    validation: Validation
    loader: Loader
    saver: Saver
    log: RunLog
    meter: Meter
    state: TrainState
    started: float
    validated: Validated | None = None  # the newest value of this start

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.run.run_dir)

    def train(self) -> TrainState:
        """Train to run.train.total_steps, or until asked to stop; returns where it stopped, all of it on disk."""
        run, saver, begun, is_bound = self.run, self.saver, self.state.step, True
        if self.world.is_main:
            (self.run_dir / FINISHED).unlink(missing_ok=True)
        batches = iter(self.loader)
        with (
            StopRequest() as stop,
            Watchdog(run.guards.stall_seconds, self.world.rank) as watchdog,
            progress_bar(self) as bar,
        ):
            while self.state.step < run.train.total_steps:
                watchdog.beat(f"at step {self.state.step + 1}")
                before = self.state
                result = self.stepper.step(batches, before, stop.asked, saver.busy)
                is_bound = result.nelbo_is_bound
                self.state = update_state(before.advance(run.train.global_batch, run.data.length), result)
                report(self, result, bar)
                self.guard(result, before)
                step, last = self.state.step, self.state.step == run.train.total_steps
                if clip_search_enabled(run) and is_due(run.objective.clip_search.every, step) and not last:
                    watchdog.beat("searching the clip interval")
                    self.search_clip()
                if self.validation.is_due(step, last):
                    watchdog.beat("validating")
                    self.validate()
                if is_due(run.train.export_every, step) or last:
                    watchdog.beat("exporting")
                    self.export()
                watchdog.beat("saving")
                if saver.pending and not result.still_saving:
                    saver.finish()
                if is_due(run.train.checkpoint_every, step) or last or result.stop_asked:
                    self.save()
                if result.stop_asked and not last:
                    break
            saver.finish()
        self.close(begun, is_bound)
        return self.state

    def guard(self, result: StepResult, before: TrainState) -> None:
        """Say what was skipped or spiked, and with which samples; raises UserError where the run should not go on."""
        guards, log = self.run.guards, self.log
        spike = guards.spike != "none" and is_spike(before.recent, result.nelbo, guards.spike_sigmas)
        if not (result.skipped or spike):
            return
        reason = "spike" if spike else "not finite"
        ids = [sample for part in self.world.all_gather_object(result.ids) for sample in part]
        log.incident(
            {
                "step": result.step,
                "reason": reason,
                "skipped": result.skipped,
                "loss": finite(result.loss),
                "grad_norm": finite(result.grad_norm),
                "samples": ids,
            }
        )
        what = f"step {result.step}: loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}"
        log.say(f"{what}: {reason}{', no update' if result.skipped else ''}; its samples are in {INCIDENTS}")
        end = None
        if spike and guards.spike == "stop":
            end = f"{what} is a spike, and guards.spike=stop; the newest checkpoint is from before it"
        elif len(self.state.skipped) > guards.max_skipped:
            end = (
                f"{what}: {len(self.state.skipped)} steps of the last {SKIPPED_OF} made no update, more than "
                f"guards.max_skipped={guards.max_skipped}; lower optim.lr or lengthen optim.warmup_steps; see "
                f"{INCIDENTS}"
            )
        if end is not None:
            self.saver.finish()  # what is being written is from before
            raise UserError(end)

    def search_clip(self) -> None:
        """Choose the interval that the steps from here on train on, and say so."""
        self.state, lines, scalars = self.clip_search.search(self.state)
        for line in lines:
            self.log.say(f"step {self.state.step}: {line}")
        self.log.scalars(scalars, self.state.step)

    def validate(self) -> None:
        """Take the bound on held-out text, say it and put it on record."""
        start = time.perf_counter()
        state, log = self.state, self.log
        self.validated = found = self.validation.run(state.step)
        log.validation(found.record(time.perf_counter() - start))
        log.scalars(found.scalars(), state.step)
        log.say(f"step {state.step}: validation {found}")

    def export(self) -> None:
        """Write the averaged weights with configuration and tokenizer, for evaluation and sampling."""
        weights = self.ema.gather(self.world)
        self.world.on_main(lambda: write_run_export(self.run, self.state, weights, self.log.say))

    def save(self) -> None:
        """Begin to write a checkpoint of this moment; `saver.finish` commits it."""
        self.log.flush()
        state: dict[str, Any] = {
            **self.state.to_dict(),
            CONFIGURATION: dataclasses.asdict(self.run),
            "zero_stage": self.engine.stage,
            "updates": self.engine.masters.updates,
            "ema_updates": self.ema.updates,
            "loader": self.loader.state(self.state.samples),
        }
        self.saver.start(export_name(self.state.step), state, itertools.chain(self.engine.pieces(), self.ema.pieces()))

    def close(self, begun: int, is_bound: bool) -> None:
        """Say how this start, which began after `begun` steps, has ended, and note the end of the run."""
        step, log = self.state.step, self.log
        finished = step >= self.run.train.total_steps
        if finished:
            seconds = time.perf_counter() - self.started
            for line in closing_lines(self.run, self.state, begun, seconds, is_bound, self.validated):
                log.say(line)
        else:
            log.say(f"asked to stop: saved after step {step}; the same command continues")
        log.close()
        if self.world.is_main and finished:
            write_json(self.run_dir / FINISHED, {"step": step})


def update_state(state: TrainState, result: StepResult) -> TrainState:
    """The state with what the step's batch has shown: its loss, and the moments of its block size."""
    state = state.with_loss(None if result.skipped else result.nelbo)
    if result.moments is None or result.skipped:
        return state
    clip = state.clip(result.block_size)
    return state.with_clip(result.block_size, dataclasses.replace(clip, moments=clip.moments.add(result.moments)))


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every `every` steps happens after `step`."""
    return step % every == 0


def clip_search_enabled(run: RunConfig) -> bool:
    """Whether the clip interval is looked for while training."""
    return run.objective.clip_search.method != "none"
