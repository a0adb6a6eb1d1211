"""The largest micro-batch that divides a batch on so many ranks and fits in a rank's memory by the plan."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from bd3_ds.config.schema import RunConfig
from bd3_ds.model.network import Network

if TYPE_CHECKING:
    from bd3_ds.train.plan import Machine


def largest_micro_batch(
    run: RunConfig, network: Network, ds_json: dict[str, Any], world_size: int, machine: Machine
) -> int | None:
    """The largest train.micro_batch for `run` on `world_size` ranks of `machine`, whatever it is set to now.

    None where train.global_batch cannot be divided among the ranks, or where not even one sequence fits.
    """
    from bd3_ds.train.memory import zero_of  # with torch, which a mistake in the recipe need not wait for
    from bd3_ds.train.plan import worst_memory

    zero, search = zero_of(ds_json), run.objective.clip_search
    sizes = micro_batches(run, world_size)
    if search.method == "grid":  # a round of it takes a micro-batch of every rank
        most = max(1, search.sequences * run.train.sequence_parallel // world_size)
        sizes = [size for size in sizes if size <= most]
    for size in reversed(sizes):
        tried = set_micro_batch(run, size)
        recompute = run.train.activation_checkpointing
        if worst_memory(tried, network, zero, world_size, recompute, machine.cuda).peak <= machine.memory:
            return size
    return None


def micro_batches(run: RunConfig, world_size: int) -> list[int]:
    """All that divide train.global_batch on these ranks, smallest first; none where it cannot be divided."""
    sequences, left = divmod(run.train.global_batch * run.train.sequence_parallel, world_size)
    if left or world_size % run.train.sequence_parallel:
        return []
    return [size for size in range(1, sequences + 1) if sequences % size == 0]


def set_micro_batch(run: RunConfig, size: int) -> RunConfig:
    """The run with train.micro_batch=size."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch=size))
