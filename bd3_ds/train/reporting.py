"""Per-step reports: a record, TensorBoard scalars every log_every steps, the progress bar."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from bd3_ds.diffusion.objective import BINS
from bd3_ds.train.meter import memory_in_use_gb, peak_memory_gb
from bd3_ds.train.step import StepResult

if TYPE_CHECKING:
    from bd3_ds.train.trainer import Trainer


def progress_bar(trainer: Trainer) -> Any:
    """Steps done, time left; disabled on other ranks, rarely redrawn where the console is a file."""
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
    if not (state.step % run.train.log_every == 0 or state.step == run.train.total_steps):
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
    """The postfix of the progress bar; memory is the main rank's."""
    validated = "" if trainer.validated is None else f"val {trainer.validated.nelbo:.3f}, "
    return (
        f"nelbo {nelbo:.3f}, {validated}{rates['perf/tokens_per_s']:,.0f} tokens/s, "
        f"{memory_in_use_gb(trainer.world.device):.1f} GiB, data wait {rates['perf/data_wait']:.1%}"
    )


def finite(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None
