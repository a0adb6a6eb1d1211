"""Closing messages: when a run ends, and when a finished run is started again."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from pathlib import Path

from bd3_ds.checkpoint.export import export_name
from bd3_ds.checkpoint.manifest import complete_checkpoint
from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.resources import ROOT
from bd3_ds.runtime.run_dir import CHECKPOINTS, EXPORTS, finished_step
from bd3_ds.runtime.world import World
from bd3_ds.train.state import TrainState
from bd3_ds.train.validation import Validated


def finished_before(run: RunConfig, world: World) -> int | None:
    """The step at which an earlier start finished the run, where this one has nothing to add; the same on all ranks.

    The main rank decides: what a file system shows may differ between hosts for a while. A run whose last checkpoint
    was removed or damaged is not finished.
    """
    step = world.on_main(lambda: _finished_step(Path(run.run_dir)))
    return step if step >= run.train.total_steps else None


def _finished_step(run_dir: Path) -> int:
    """0 where the run is not finished."""
    step = finished_step(run_dir)
    return 0 if complete_checkpoint(run_dir / CHECKPOINTS / export_name(step)) is None else step


def nothing_to_do(run: RunConfig, step: int) -> list[str]:
    """The message when a finished run is started again."""
    asked = f"train.total_steps={run.train.total_steps}"
    return [
        f"{run.run_dir} finished at step {step}, and {asked} asks for no more: nothing to do, nothing changed. "
        f"train.total_steps=N with N above {step} goes on from there",
        _next(run),
    ]


def closing_lines(
    run: RunConfig,
    state: TrainState,
    begun: int,
    seconds: float,
    is_bound: bool,
    validated: Validated | None,
) -> list[str]:
    """The message after the last step of a start that began after `begun` steps and took so many seconds."""
    steps = state.step - begun
    tokens = steps * run.train.global_batch * run.data.length
    here = "" if begun == 0 else f", {steps:,} of them since this start,"
    lines = [
        f"finished: {state.step:,} steps{here} and {state.tokens:,} tokens; {duration(seconds)} since the start, "
        f"{tokens / max(seconds, 1e-9):,.0f} tokens/s with saves, exports and validation"
    ]
    if state.recent:
        name = "nelbo" if is_bound else "loss (of clipped or uneven masking: no bound)"
        lines.append(
            f"training {name} {statistics.fmean(state.recent):.4f} nats/token, mean of the last {len(state.recent)} "
            "steps"
        )
    if validated is not None:
        lines.append(f"validation {validated}, weights as trained, not averaged")
    export = Path(run.run_dir) / EXPORTS / export_name(state.step)
    return [*lines, f"export (averaged weights): {export}", _next(run)]


def duration(seconds: float) -> str:
    """Such as 42 s, 3 min 5 s, 2 h 10 min or 3 d 4 h."""
    whole = round(seconds)
    for unit, part, size in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if whole >= size:
            smaller = {"h": 3600, "min": 60, "s": 1}[part]
            return f"{whole // size} {unit} {whole % size // smaller} {part}"
    return f"{whole} s"


def _next(run: RunConfig) -> str:
    """Commands that can be typed as they stand."""
    own = Path(sys.prefix) == ROOT / ".venv"  # its python need not be that of the shell
    if (ROOT / "run.py").is_file():
        script = os.path.relpath(ROOT / ("run.sh" if own else "run.py"))
        start = (script if os.sep in script else f"./{script}") if own else f"python {script}"
    else:
        start = "bd3-ds"
    place = shlex.quote(run.run_dir)
    modes = ["evaluate", "sample", "report"] if run.eval.sets else ["sample", "report"]
    return "next: " + "   ".join(f"{start} {mode} {place}" for mode in modes)
