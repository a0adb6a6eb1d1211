"""The training loop. Start reading here; each line's detail is one file away."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from bd3_ds.config.schema import RunConfig
from bd3_ds.diffusion.objective import BINS
from bd3_ds.runtime.files import write_json
from bd3_ds.runtime.log import FINISHED
from bd3_ds.runtime.world import World
from bd3_ds.train.build import Trainer, build
from bd3_ds.train.guards import Guards
from bd3_ds.train.meter import peak_memory_gb
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import StepResult


def train(run: RunConfig, ds_json: dict[str, Any], world: World) -> TrainState:
    """Train to run.train.total_steps, or until asked to stop; returns where it stopped, all of it on disk."""
    trainer = build(run, ds_json, world)
    finished = trainer.run_dir / FINISHED
    if world.is_main:
        finished.unlink(missing_ok=True)
    batches = iter(trainer.loader)
    with Guards() as guard, progress_bar(trainer) as bar:
        while trainer.state.step < run.train.total_steps:
            result = trainer.stepper.step(batches, trainer.state, guard.asked)
            guard.check(result)
            trainer.state = learn(trainer.state.advance(run.train.global_batch, run.data.length), result)
            report(trainer, result, bar)
            last = trainer.state.step == run.train.total_steps
            if searches(run) and due(run.objective.clip_search.every, trainer.state.step) and not last:
                search_clip(trainer)
            if due(run.train.export_every, trainer.state.step) or last:
                trainer.export()
            if due(run.train.checkpoint_every, trainer.state.step) or last or guard.wants_stop:
                trainer.save()
            if guard.wants_stop:
                trainer.log.say(f"asked to stop: saved after step {trainer.state.step}; the same command continues")
                break
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


def learn(state: TrainState, result: StepResult) -> TrainState:
    """The state with what the step's batch has shown of its block size."""
    if result.moments is None:
        return state
    clip = state.clip(result.block_size)
    return state.with_clip(result.block_size, replace(clip, moments=clip.moments.add(result.moments)))


def search_clip(trainer: Trainer) -> None:
    """Choose the interval that the steps from here on train on, and say so."""
    trainer.state, lines, scalars = trainer.clip_search.search(trainer.state)
    for line in lines:
        trainer.log.say(f"step {trainer.state.step}: {line}")
    trainer.log.scalars(scalars, trainer.state.step)


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
            "loss": result.loss,
            "nelbo": result.nelbo,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "seconds": result.seconds,
            "block_size": result.block_size,
            "t_min": t_min,
            "t_max": t_max,
            "block_variance": result.block_variance,
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
    bar.set_postfix_str(f"nelbo {result.nelbo:.3f}, {rates['perf/tokens_per_s']:,.0f} tokens/s", refresh=False)


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
    )
