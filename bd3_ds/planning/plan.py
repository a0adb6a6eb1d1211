"""What a run needs before it is started: memory by kind, the stages that fit, speed and days, bytes between ranks."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from bd3_ds.config.check import accumulation_steps
from bd3_ds.config.ds_json import DEFAULT, load_ds_json, zero_stage
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_sizes
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.model.dit import DiTConfig
from bd3_ds.model.flops import recomputed_flops_per_sequence, training_flops_per_sequence
from bd3_ds.planning import communication
from bd3_ds.planning.activations import RECOMPUTE, pass_of
from bd3_ds.planning.disk import disk_of
from bd3_ds.planning.memory import Memory, Zero, memory_of, parameter_count, zero_of
from bd3_ds.runtime.gpus import find_gpu, gpu_of_driver
from bd3_ds.runtime.peak_flops import peak_flops

USABLE = 0.92  # of a device's memory: its context, NCCL's buffers and fragments take the rest; of a host's, the system
MFU = 0.4  # a guess for the 40 % that dense transformers of this size reach; `perf/mfu` of a run tells

# Seconds for a sequence of up to 1,024 tokens from a rank's loader with no, one, or two and more worker processes
# (docs/performance.md); longer ones take as much longer.
LOADER_SECONDS = (1024 / 5.7e6, 1024 / 1.9e6, 1024 / 2.8e6)


@dataclass(frozen=True)
class Machine:
    """What one rank has: bytes of memory that a run may fill, FLOP/s of matrix products; `cuda`: it is a GPU.

    `link`: bytes a second and direction to the other ranks of its node.
    """

    name: str
    memory: float
    peak: float
    cuda: bool
    link: float = communication.NVLINK


def machine_of(gpu: str | None, precision: str, ranks_per_node: int) -> Machine:
    """The GPU of that name, else this machine; raises UserError for unknown names. fp32 is planned at 1/8 of bf16."""
    if gpu is not None:
        known = find_gpu(gpu, "--gpu")
        peak = known.peak_bf16 / (1 if precision == "bf16" else 8)
        return Machine(known.name, USABLE * known.memory, peak, True, known.link)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        memory, name = torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)
        here = gpu_of_driver(name)
        link = communication.NVLINK if here is None else here.link
        return Machine(name, USABLE * memory, peak_flops(device, precision), True, link)
    memory = USABLE * psutil.virtual_memory().total / ranks_per_node
    # The rate is measured with all threads of this process, which ranks beside one another may not have.
    cores = min(1.0, (os.cpu_count() or 1) / (torch.get_num_threads() * ranks_per_node))
    return Machine("this machine's CPUs", memory, cores * peak_flops(torch.device("cpu"), precision), False)


def make_plan(
    run: RunConfig,
    network: DiTConfig,
    ds_json: dict[str, Any],
    world_size: int,
    nodes: int,
    machine: Machine,
    mfu: float,
) -> dict[str, Any]:
    """The whole plan as plain values: bytes, FLOP, seconds; `plan_table` says it in a table."""
    shared, mode = run.train.sequence_parallel, run.train.activation_checkpointing
    accumulation = accumulation_steps(run, world_size)
    parameters = parameter_count(network)
    tokens_a_step = run.train.global_batch * run.data.length
    flops, again = flops_per_token(network, run)
    rate = world_size * machine.peak * mfu / (flops + again)
    total = run.train.total_steps * tokens_a_step
    zero = zero_of(ds_json)
    memory = worst_memory(run, network, zero, world_size, mode, machine.cuda)
    table = _stages(run, network, ds_json, world_size, machine)
    traffic = _traffic(run, network, parameters, zero, world_size, world_size // nodes, accumulation)
    compute, sending = tokens_a_step / rate, communication.seconds(traffic, machine.link)
    return {
        "parameters": parameters,
        "ranks": world_size,
        "nodes": nodes,
        "machine": asdict(machine),
        "zero": asdict(zero),
        "recompute": mode,
        "batch": {
            "global": run.train.global_batch,
            "micro": run.train.micro_batch,
            "accumulation": accumulation,
            "groups": world_size // shared,
            "sequence_parallel": shared,
            "tokens": tokens_a_step,
        },
        "flops": {"per_token": flops, "recomputed_per_token": again, "total": flops * total},
        "speed": {
            "mfu": mfu,
            "tokens_per_s": rate,
            "step_seconds": compute,
            "tokens": total,
            "days": total / rate / 86400,
        },
        "bound": _bound(run, compute, sending, world_size),
        "memory": {**memory.as_dict(), "fits": memory.peak <= machine.memory},
        "stages": table,
        "smallest_stage": {
            mode: next((row["stage"] for row in table if row["recompute"] == mode and row["fits"]), None)
            for mode in RECOMPUTE
        },
        "communication": {
            "collectives": [{**asdict(c), "sent": c.sent, "seconds": c.seconds_by(machine.link)} for c in traffic],
            "sent": sum(c.sent for c in traffic),
            "seconds": sending,
            "of_compute": sending / compute,
        },
        "disk": disk_of(run, parameters).as_dict(),
    }


def _bound(run: RunConfig, compute: float, sending: float, world_size: int) -> dict[str, Any]:
    """The longest of what a step does beside one another, and the days and tokens a second that it allows."""
    each = LOADER_SECONDS[min(run.data.workers, 2)] * max(1.0, run.data.length / 1024)
    reading = run.train.global_batch * run.train.sequence_parallel / world_size * each
    seconds = {"compute": compute, "communication": sending, "data": reading}
    name = max(seconds, key=lambda kind: seconds[kind])
    return {
        "name": name,
        "seconds": seconds,
        "step_seconds": seconds[name],
        "tokens_per_s": run.train.global_batch * run.data.length / seconds[name],
        "days": run.train.total_steps * seconds[name] / 86400,
    }


def worst_memory(run: RunConfig, network: DiTConfig, zero: Zero, world_size: int, recompute: str, cuda: bool) -> Memory:
    """Of the block size that needs most, where it changes over the run."""
    sizes = {size for step in (0, *run.objective.block_schedule) for size in block_sizes(run, step)}
    found = [memory_of(run, network, size, zero, world_size, recompute, cuda) for size in sorted(sizes)]
    return max(found, key=lambda memory: memory.peak)


def flops_per_token(network: DiTConfig, run: RunConfig) -> tuple[float, float]:
    """Training FLOPs of a clean token, and those computed again; means over the stages of a block size that changes."""
    masked = 1.0 if OBJECTIVES[run.objective.name].causal else make_proposal(run.objective.schedule).mean_rate
    length, steps, name, views = run.data.length, run.train.total_steps, run.objective.name, run.objective.views
    begins = sorted({0, *(step for step in run.objective.block_schedule if step < steps)})
    total, again = 0.0, 0.0
    for begin, end in zip(begins, [*begins[1:], steps], strict=True):
        sizes = block_sizes(run, begin)
        part = (end - begin) / steps / len(sizes)
        for size in sizes:
            total += part * training_flops_per_sequence(network, name, length, size, masked, views)
            mode = run.train.activation_checkpointing
            again += part * recomputed_flops_per_sequence(network, name, length, size, views, mode)
    return total / length, again / length


def _stages(
    run: RunConfig, network: DiTConfig, ds_json: dict[str, Any], world_size: int, machine: Machine
) -> list[dict[str, Any]]:
    """Every stage with every recomputation: the JSON's own as it stands, others as ds_configs/zero*.json have them."""
    rows = []
    for stage in range(4):
        own = stage == zero_stage(ds_json)
        zero = zero_of(ds_json if own else load_ds_json(DEFAULT.parent / f"zero{stage}.json"))
        for recompute in RECOMPUTE:
            memory = worst_memory(run, network, zero, world_size, recompute, machine.cuda)
            fits = memory.peak <= machine.memory
            rows.append({"stage": stage, "recompute": recompute, "peak": memory.peak, "fits": fits})
    return rows


def _traffic(
    run: RunConfig,
    network: DiTConfig,
    parameters: int,
    zero: Zero,
    world_size: int,
    per_node: int,
    accumulation: int,
) -> list[communication.Collective]:
    if world_size == 1:
        return []
    width = 2 if run.train.precision == "bf16" else 4
    found = communication.zero_traffic(parameters, zero.variant, world_size, per_node, accumulation, width, zero.reuse)
    shared = run.train.sequence_parallel
    sizes = {size for step in (0, *run.objective.block_schedule) for size in block_sizes(run, step)}
    given = max((pass_of(run, network, size, zero.stage, True) for size in sizes), key=lambda one: one.tokens)
    tokens, queries = (given.rows * shared * count for count in (given.tokens, given.queries))
    return [
        *found,
        *communication.ulysses_traffic(
            network.hidden_size, network.layers, tokens, queries, shared, given.compute, accumulation
        ),
    ]
