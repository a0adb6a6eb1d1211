"""`train.micro_batch: auto`: the largest that divides the batch on these ranks and, by the plan, fits their memory."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

from bd3_ds.config.check import divisors
from bd3_ds.config.schema import AUTO, RunConfig

if TYPE_CHECKING:
    from bd3_ds.model.dit_config import DiTConfig


def with_micro_batch(
    run: RunConfig, ds_json: dict[str, Any], world_size: int, per_node: int, gpu: str | None = None
) -> RunConfig:
    """`run` with a number for its micro-batch, the same on all ranks; which one is said in a line on stderr.

    `gpu`: the kind of accelerator to plan for; None: what is here, `per_node` ranks of it. Where not even one sequence
    fits by the plan, it is one.
    """
    if run.train.micro_batch != AUTO:
        return run
    import torch  # late, here and below: a mistake in the recipe need not wait for it

    from bd3_ds.model.build import dit_config
    from bd3_ds.runtime.gpus import GIB

    name, memory, cuda = _memory_of_rank(gpu, per_node)
    network = dit_config(run.model, run.objective.name)
    largest = largest_micro_batch(run, network, ds_json, world_size, memory, cuda) or 1
    if torch.distributed.is_initialized():  # hosts need not be alike; what fits the least of them fits all
        found: list[int] = [0] * world_size
        torch.distributed.all_gather_object(found, largest)
        largest = min(found)
    if os.environ.get("RANK", "0") == "0":
        part, peak = _part(run, world_size), _peak(run, network, ds_json, world_size, largest, cuda)
        fits = "fits" if peak <= memory else "is the least, but does not fit"
        print(
            f"train.micro_batch={largest} (auto) divides the {part} sequences of a rank's step and {fits} {name}: "
            f"{peak / GIB:.2f} of {memory / GIB:.1f} GiB planned",
            file=sys.stderr,
            flush=True,
        )
    return set_micro_batch(run, largest)


def _part(run: RunConfig, world_size: int) -> int:
    """Sequences of an optimizer step that one rank, or the ranks that share a sequence, work on."""
    return run.train.global_batch * run.train.sequence_parallel // world_size


def largest_micro_batch(
    run: RunConfig, network: DiTConfig, ds_json: dict[str, Any], world_size: int, memory: float, cuda: bool
) -> int | None:
    """The largest train.micro_batch for `run`, whatever it is set to now, on ranks of `memory` bytes each.

    None where train.global_batch cannot be divided among the ranks, or where not even one sequence fits.
    """
    most, search = run.train.global_batch, run.objective.clip_search
    if search.method == "grid":  # a round of it takes a micro-batch of every rank
        most = max(1, search.sequences * run.train.sequence_parallel // world_size)
    sizes = [size for size in micro_batches(run, world_size) if size <= most]
    fitting = (size for size in reversed(sizes) if _peak(run, network, ds_json, world_size, size, cuda) <= memory)
    return next(fitting, None)


def micro_batches(run: RunConfig, world_size: int) -> list[int]:
    """All that divide train.global_batch on these ranks, smallest first; none where it cannot be divided."""
    if world_size % run.train.sequence_parallel or run.train.global_batch % (world_size // run.train.sequence_parallel):
        return []
    return sorted(divisors(_part(run, world_size)))


def set_micro_batch(run: RunConfig, size: int) -> RunConfig:
    """The run with train.micro_batch=size."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch=size))


def _peak(run: RunConfig, network: DiTConfig, ds_json: dict[str, Any], world_size: int, size: int, cuda: bool) -> int:
    """The most bytes that a rank holds with this micro-batch."""
    from bd3_ds.planning.memory import zero_of
    from bd3_ds.planning.plan import worst_memory

    recompute = run.train.activation_checkpointing
    return worst_memory(set_micro_batch(run, size), network, zero_of(ds_json), world_size, recompute, cuda).peak


def _memory_of_rank(gpu: str | None, per_node: int) -> tuple[str, float, bool]:
    """Its name, the bytes of it that a run may fill, and whether it is a GPU's."""
    import psutil
    import torch

    from bd3_ds.planning.plan import USABLE
    from bd3_ds.runtime.gpus import find_gpu

    if gpu is not None:
        known = find_gpu(gpu, "--gpu")
        return known.name, USABLE * known.memory, True
    if torch.cuda.is_available():
        device = torch.device("cuda")
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.get_device_name(device), USABLE * total, True
    return "this machine's CPUs", USABLE * psutil.virtual_memory().total / per_node, False
