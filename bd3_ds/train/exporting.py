"""Exports written during training: the block size and clip interval that they are scored with, and their pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from bd3_ds.checkpoint.export import export_name, write_export
from bd3_ds.checkpoint.retention import prune_exports
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_size, block_sizes
from bd3_ds.data.pack import TOKENIZER_DIR
from bd3_ds.data.remote import pack_directory
from bd3_ds.runtime.run_dir import EXPORTS
from bd3_ds.train.state import TrainState


def scored_block_size(run: RunConfig, step: int) -> int:
    """The block size that an export after `step` steps is scored with: that of the stage, where it has only one."""
    sizes = block_sizes(run, max(0, step - 1))
    return sizes[0] if OBJECTIVES[run.objective.name].has_blocks and len(sizes) == 1 else block_size(run)


def scored_as_trained(run: RunConfig, state: TrainState) -> RunConfig:
    """The run with the block size that its export is scored with, and the interval of times in force for it."""
    objective, size = run.objective, scored_block_size(run, state.step)
    if OBJECTIVES[objective.name].has_blocks and len(block_sizes(run, max(0, state.step - 1))) == 1:
        objective = dataclasses.replace(objective, block_size=size)
    found = state.clip(size).interval
    if found is not None:
        schedule = dataclasses.replace(objective.schedule, t_min=found[0], t_max=found[1])
        objective = dataclasses.replace(objective, schedule=schedule)
    return dataclasses.replace(run, objective=objective)


def write_run_export(run: RunConfig, state: TrainState, weights: dict[str, Tensor], say: Callable[[str], None]) -> None:
    """Write averaged weights with configuration and tokenizer, and remove what train.keep_exports does not keep."""
    run_dir = Path(run.run_dir)
    tokenizer = pack_directory(run.data.train, run.data.cache) / TOKENIZER_DIR
    name = export_name(state.step)
    write_export(run_dir / EXPORTS / name, weights, scored_as_trained(run, state), tokenizer, state.step)
    if (keep := run.train.keep_exports) is None:
        return
    try:
        failed = prune_exports(run_dir, state.step, keep, run.eval)
    except OSError as error:  # the new export is whole: nothing here ends the run
        failed = {run_dir / EXPORTS: error}
    for path, reason in failed.items():
        say(f"cannot remove the old export {path}: {reason.strerror or reason}; the next export tries again")
