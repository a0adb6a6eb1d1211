"""`train.micro_batch: auto`: the largest that divides the batch on these ranks and, by the plan, fits their memory."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import psutil
import torch

from bd3_ds.config.check import divisors
from bd3_ds.config.schema import AUTO, RunConfig
from bd3_ds.model.build import network_of
from bd3_ds.train.gpus import GIB, find_gpu
from bd3_ds.train.memory import zero_of
from bd3_ds.train.plan import USABLE, worst_memory


def with_micro_batch(
    run: RunConfig, ds_json: dict[str, Any], world_size: int, per_node: int, gpu: str | None = None
) -> RunConfig:
    """`run` with a number for its micro-batch, the same on all ranks; which one is said in a line on stderr.

    `gpu`: the kind of accelerator to plan for; None: what is here, `per_node` ranks of it. Where not even one sequence
    fits by the plan, it is one.
    """
    if run.train.micro_batch != AUTO:
        return run
    name, memory, cuda = _memory_of_rank(gpu, per_node)
    largest, peak = _largest(run, ds_json, world_size, memory, cuda)
    if torch.distributed.is_initialized():  # hosts need not be alike; what fits the least of them fits all
        found: list[int] = [0] * world_size
        torch.distributed.all_gather_object(found, largest)
        largest = min(found)
    if os.environ.get("RANK", "0") == "0":
        part = _part(run, world_size)
        fits = "fits" if peak <= memory else "is the least, but does not fit"
        print(
            f"train.micro_batch={largest} (auto) divides the {part} sequences of a rank's step and {fits} {name}: "
            f"{peak / GIB:.2f} of {memory / GIB:.1f} GiB planned",
            file=sys.stderr,
            flush=True,
        )
    return dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch=largest))


def _part(run: RunConfig, world_size: int) -> int:
    """Sequences of an optimizer step that one rank, or the ranks that share a sequence, work on."""
    return run.train.global_batch * run.train.sequence_parallel // world_size


def _largest(run: RunConfig, ds_json: dict[str, Any], world_size: int, memory: float, cuda: bool) -> tuple[int, int]:
    """The micro-batch, and the most bytes that a rank then holds."""
    part, search = _part(run, world_size), run.objective.clip_search
    network, zero = network_of(run.model, run.objective.name), zero_of(ds_json)
    most = part
    if search.method == "grid":  # a round of it takes a micro-batch of every rank
        most = max(1, min(part, search.sequences * run.train.sequence_parallel // world_size))
    peak = 0
    for size in sorted(divisors(part), reverse=True):
        if size > most:
            continue
        tried = dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch=size))
        peak = worst_memory(tried, network, zero, world_size, run.train.activation_checkpointing, cuda).peak
        if peak <= memory:
            return size, peak
    return 1, peak


def _memory_of_rank(gpu: str | None, per_node: int) -> tuple[str, float, bool]:
    """Its name, the bytes of it that a run may fill, and whether it is a GPU's."""
    if gpu is not None:
        known = find_gpu(gpu, "--gpu")
        return known.name, USABLE * known.memory, True
    if torch.cuda.is_available():
        device = torch.device("cuda")
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.get_device_name(device), USABLE * total, True
    return "this machine's CPUs", USABLE * psutil.virtual_memory().total / per_node, False
