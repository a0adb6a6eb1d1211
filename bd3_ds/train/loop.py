"""The training loop. Start reading here; each line's detail is one file away."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from bd3_ds.checkpoint.store import gather
from bd3_ds.config.schema import RunConfig
from bd3_ds.diffusion.objective import BINS
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import write_json
from bd3_ds.runtime.run_dir import FINISHED, INCIDENTS
from bd3_ds.runtime.world import World
from bd3_ds.train.build import Trainer, build
from bd3_ds.train.closing import closing_words, finished_before, nothing_to_do
from bd3_ds.train.guards import StopRequest, Watchdog, is_spike
from bd3_ds.train.meter import memory_in_use_gb, peak_memory_gb
from bd3_ds.train.state import SKIPPED_OF, TrainState
from bd3_ds.train.step import StepResult


def train(run: RunConfig, ds_json: dict[str, Any], world: World) -> TrainState:
    """Train to run.train.total_steps, or until asked to stop; returns where it stopped, all of it on disk."""
    start = time.perf_counter()
    if (step := finished_before(run, world)) is not None:
        if world.is_main:
            print(*nothing_to_do(run, step), sep="\n", file=sys.stderr, flush=True)
        return TrainState(step=step)
    trainer = build(run, ds_json, world)
    finished = trainer.run_dir / FINISHED
    if world.is_main:
        finished.unlink(missing_ok=True)
    batches = iter(trainer.loader)
    saver, begun, is_bound = trainer.saver, trainer.state.step, True
    with (
        StopRequest() as stop,
        Watchdog(run.guards.stall_seconds, world.rank) as watchdog,
        progress_bar(trainer) as bar,
    ):
        while trainer.state.step < run.train.total_steps:
            watchdog.beat(f"at step {trainer.state.step + 1}")
            before = trainer.state
            result = trainer.stepper.step(batches, before, stop.asked, saver.busy)
            is_bound = result.nelbo_is_bound
            trainer.state = learn(before.advance(run.train.global_batch, run.data.length), result)
            report(trainer, result, bar)
            guard(trainer, result, before)
            last = trainer.state.step == run.train.total_steps
            if searches(run) and due(run.objective.clip_search.every, trainer.state.step) and not last:
                watchdog.beat("searching the clip interval")
                search_clip(trainer)
            if trainer.validation.is_due(trainer.state.step, last):
                watchdog.beat("validating")
                validate(trainer)
            if due(run.train.export_every, trainer.state.step) or last:
                watchdog.beat("exporting")
                trainer.export()
            watchdog.beat("saving")
            if saver.pending and not result.still_saving:
                saver.finish()
            if due(run.train.checkpoint_every, trainer.state.step) or last or result.stop_asked:
                trainer.save()
            if result.stop_asked and not last:
                break
        saver.finish()
    if trainer.state.step < run.train.total_steps:
        trainer.log.say(f"asked to stop: saved after step {trainer.state.step}; the same command continues")
    else:
        seconds = time.perf_counter() - start
        for line in closing_words(run, trainer.state, begun, seconds, is_bound, trainer.validated):
            trainer.log.say(line)
    trainer.log.close()
    if world.is_main and trainer.state.step >= run.train.total_steps:
        write_json(finished, {"step": trainer.state.step})
    return trainer.state


def due(every: int, step: int) -> bool:
    """Whether something that happens every `every` steps happens after `step`."""
    return step % every == 0


def searches(run: RunConfig) -> bool:
    """Whether the clip interval is looked for while training."""
    return run.objective.clip_search.method != "none"


def guard(trainer: Trainer, result: StepResult, before: TrainState) -> None:
    """Say what was skipped or spiked, and with which samples; raises UserError where the run should not go on."""
    guards, log = trainer.run.guards, trainer.log
    spike = guards.spike != "none" and is_spike(before.recent, result.nelbo, guards.spike_sigmas)
    if not (result.skipped or spike):
        return
    reason = "spike" if spike else "not finite"
    ids = [sample for share in gather(result.ids, trainer.world) for sample in share]
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
    elif len(trainer.state.skipped) > guards.max_skipped:
        end = (
            f"{what}: {len(trainer.state.skipped)} steps of the last {SKIPPED_OF} made no update, more than "
            f"guards.max_skipped={guards.max_skipped}; lower optim.lr or lengthen optim.warmup_steps; see {INCIDENTS}"
        )
    if end is not None:
        trainer.saver.finish()  # what is being written is from before
        raise UserError(end)


def finite(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None


def learn(state: TrainState, result: StepResult) -> TrainState:
    """The state with what the step's batch has shown: its loss, and the moments of its block size."""
    state = state.with_loss(None if result.skipped else result.nelbo)
    if result.moments is None or result.skipped:
        return state
    clip = state.clip(result.block_size)
    return state.with_clip(result.block_size, replace(clip, moments=clip.moments.add(result.moments)))


def search_clip(trainer: Trainer) -> None:
    """Choose the interval that the steps from here on train on, and say so."""
    trainer.state, lines, scalars = trainer.clip_search.search(trainer.state)
    for line in lines:
        trainer.log.say(f"step {trainer.state.step}: {line}")
    trainer.log.scalars(scalars, trainer.state.step)


def validate(trainer: Trainer) -> None:
    """Take the bound on held-out text, say it and put it on record."""
    start = time.perf_counter()
    state, log = trainer.state, trainer.log
    trainer.validated = found = trainer.validation.run(state.step)
    log.validation(found.record(time.perf_counter() - start))
    log.scalars(found.scalars(), state.step)
    log.say(f"step {state.step}: validation {found}")


def report(trainer: Trainer, result: StepResult, bar: Any) -> None:
    """One record a step; every log_every steps a point in TensorBoard and the numbers on the progress bar."""
    state, run = trainer.state, trainer.run
    trainer.meter.add(result)
    t_min, t_max = result.interval or (None, None)
    trainer.log.record(
        {
            "step": state.step,
            "samples": state.samples,
            "tokens": state.tokens,
            "loss": finite(result.loss),
            "nelbo": finite(result.nelbo),
            "grad_norm": finite(result.grad_norm),
            "lr": result.lr,
            "seconds": result.seconds,
            "block_size": result.block_size,
            "t_min": t_min,
            "t_max": t_max,
            "block_variance": None if result.block_variance is None else finite(result.block_variance),
            "nelbo_is_bound": result.nelbo_is_bound,
        }
    )
    bar.update(1)
    if not (due(run.train.log_every, state.step) or state.step == run.train.total_steps):
        return
    rates = trainer.meter.read()
    bins = {
        f"loss_by_masking_rate/{i / BINS:.1f}-{(i + 1) / BINS:.1f}": nats
        for i, nats in enumerate(result.nats_by_rate)
        if not math.isnan(nats)
    }
    scalars = {
        "train/loss": result.loss,
        "train/nelbo": result.nelbo,
        "train/grad_norm": result.grad_norm,
        "train/lr": result.lr,
        "train/block_size": result.block_size,
        "train/skipped": len(state.skipped),
        "perf/memory_gb": peak_memory_gb(trainer.world.device),
        **rates,
        **bins,
    }
    if result.nelbo_is_bound:
        scalars["train/ppl"] = math.exp(min(result.nelbo, 700.0))
    if result.interval is not None:
        scalars |= {"train/t_min": result.interval[0], "train/t_max": result.interval[1]}
    if result.block_variance is not None:
        scalars["train/block_variance"] = result.block_variance
    trainer.log.scalars(scalars, state.step)
    trainer.log.flush()
    bar.set_postfix_str(console_line(trainer, result.nelbo, rates), refresh=False)


def console_line(trainer: Trainer, nelbo: float, rates: dict[str, float]) -> str:
    """What stands behind the steps done and the time left; memory is the main rank's."""
    validated = "" if trainer.validated is None else f"val {trainer.validated.nelbo:.3f}, "
    return (
        f"nelbo {nelbo:.3f}, {validated}{rates['perf/tokens_per_s']:,.0f} tokens/s, "
        f"{memory_in_use_gb(trainer.world.device):.1f} GiB, data wait {rates['perf/data_wait']:.1%}"
    )


def progress_bar(trainer: Trainer) -> Any:
    """Steps done, time left; silent on other ranks and calm where the console is a file."""
    return tqdm(
        total=trainer.run.train.total_steps,
        initial=trainer.state.step,
        desc=trainer.run_dir.name,
        unit="step",
        disable=not trainer.world.is_main,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]",
    )
