"""What a run needs before it is started: memory by kind, the stages that fit, speed and days, bytes between ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from bd3_ds.config.check import accumulation_steps
from bd3_ds.config.schema import AR, RunConfig, block_sizes
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.model.dit import Network
from bd3_ds.model.flops import recomputed_flops_per_sequence, training_flops_per_sequence
from bd3_ds.train import communication
from bd3_ds.train.activations import RECOMPUTE, pass_of
from bd3_ds.train.gpus import GIB, find_gpu
from bd3_ds.train.memory import Memory, Zero, memory_of, parameter_count, zero_of
from bd3_ds.train.meter import peak_flops

USABLE = 0.92  # of a GPU's memory: its context, NCCL's buffers and fragments take the rest
MFU = 0.4  # a guess for the 40 % that dense transformers of this size reach; `perf/mfu` of a run tells

KINDS = ("weights", "gathered", "gradients", "optimizer", "ema", "activations", "head", "logits", "working", "buckets")


@dataclass(frozen=True)
class Machine:
    """What one rank has: bytes of memory that a run may fill, FLOP/s of matrix products; `cuda`: it is a GPU."""

    name: str
    memory: float
    peak: float
    cuda: bool


def machine_of(gpu: str | None, precision: str, ranks_per_node: int) -> Machine:
    """The GPU of that name, else this machine; raises UserError for unknown names. fp32 is planned at 1/8 of bf16."""
    if gpu is not None:
        known = find_gpu(gpu, "--gpu")
        return Machine(known.name, USABLE * known.memory, known.peak_bf16 / (1 if precision == "bf16" else 8), True)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        memory = torch.cuda.get_device_properties(device).total_memory
        return Machine(torch.cuda.get_device_name(device), USABLE * memory, peak_flops(device, precision), True)
    memory = psutil.virtual_memory().total / ranks_per_node
    return Machine("this machine's CPUs", memory, peak_flops(torch.device("cpu"), precision), False)


def make_plan(
    run: RunConfig,
    network: Network,
    ds_json: dict[str, Any],
    world_size: int,
    nodes: int,
    machine: Machine,
    mfu: float,
) -> dict[str, Any]:
    """The whole plan as plain values: bytes, FLOP, seconds; `plan_lines` says it in sentences."""
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
    compute = tokens_a_step / rate
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
        "memory": {**memory.as_dict(), "fits": memory.peak <= machine.memory},
        "stages": table,
        "smallest_stage": {
            mode: next((row["stage"] for row in table if row["recompute"] == mode and row["fits"]), None)
            for mode in RECOMPUTE
        },
        "communication": {
            "collectives": [{**asdict(c), "sent": c.sent, "seconds": c.seconds} for c in traffic],
            "sent": sum(c.sent for c in traffic),
            "seconds": communication.seconds(traffic),
            "of_compute": communication.seconds(traffic) / compute,
        },
    }


def worst_memory(run: RunConfig, network: Network, zero: Zero, world_size: int, recompute: str, cuda: bool) -> Memory:
    """Of the block size that needs most, where it changes over the run."""
    sizes = {size for step in (0, *run.objective.block_schedule) for size in block_sizes(run, step)}
    found = [memory_of(run, network, size, zero, world_size, recompute, cuda) for size in sorted(sizes)]
    return max(found, key=lambda memory: memory.peak)


def flops_per_token(network: Network, run: RunConfig) -> tuple[float, float]:
    """Training FLOPs of a clean token, and those computed again; means over the stages of a block size that changes."""
    masked = 1.0 if run.objective.name == AR else make_proposal(run.objective.schedule).mean_rate
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


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan in sentences, memory in GiB."""
    memory, speed, machine, sent = plan["memory"], plan["speed"], plan["machine"], plan["communication"]
    kinds = ", ".join(f"{kind} {memory[kind] / GIB:.2f}" for kind in KINDS if memory[kind])
    moment = max(memory["moments"], key=memory["moments"].get)
    smallest = {mode: stage for mode, stage in plan["smallest_stage"].items() if stage is not None}
    lines = [
        f"planned for {plan['ranks']} ranks on {plan['nodes']} nodes, each rank {machine['name']}: "
        f"{machine['memory'] / GIB:.1f} GiB to fill, {machine['peak'] / 1e12:,.3g} TFLOP/s",
        f"memory of a rank at ZeRO stage {plan['zero']['stage']}, in GiB: {kinds}",
        f"most at once: {memory['peak'] / GIB:.2f} GiB, in the {moment}"
        + (f"; {memory['host'] / GIB:.2f} GiB on the host" if memory["host"] else "")
        + ("" if memory["fits"] else f"; that is more than {machine['memory'] / GIB:.1f} GiB"),
        "most at once by ZeRO stage, nothing computed again / MLPs (selective) / layers (full), * fits:",
    ]
    for stage in range(4):
        rows = [row for row in plan["stages"] if row["stage"] == stage]
        cells = " / ".join(f"{row['peak'] / GIB:.2f}{'*' if row['fits'] else ''}" for row in rows)
        lines.append(f"  stage {stage}: {cells} GiB")
    if smallest:
        told = ", ".join(f"{stage} with activation_checkpointing={mode}" for mode, stage in smallest.items())
        lines.append(f"smallest stage that fits: {told}")
    else:
        lines.append(f"no stage fits {machine['name']}: lower train.micro_batch, offload, or take more ranks")
    extra = plan["flops"]["recomputed_per_token"]
    return [
        *lines,
        f"at {speed['mfu']:.0%} of the peak{f' ({extra / 1e6:,.1f} MFLOP a token computed again)' if extra else ''}: "
        f"{speed['tokens_per_s']:,.0f} tokens/s, {speed['step_seconds']:.3g} s a step, "
        f"{speed['days']:.3g} days to {speed['tokens']:,} tokens",
        f"a rank sends {sent['sent'] / 1e9:.3g} GB a step, {sent['seconds']:.3g} s at "
        f"{communication.NETWORK * 8 / 1e9:.0f} Gb/s between nodes and {communication.NVLINK / 1e9:.0f} GB/s inside, "
        f"{sent['of_compute']:.1%} of the computing that can hide it",
    ]


def _stages(
    run: RunConfig, network: Network, ds_json: dict[str, Any], world_size: int, machine: Machine
) -> list[dict[str, Any]]:
    """Every stage with every recomputation."""
    rows = []
    for stage in range(4):
        for recompute in RECOMPUTE:
            memory = worst_memory(run, network, zero_of(ds_json, stage), world_size, recompute, machine.cuda)
            fits = memory.peak <= machine.memory
            rows.append({"stage": stage, "recompute": recompute, "peak": memory.peak, "fits": fits})
    return rows


def _traffic(
    run: RunConfig,
    network: Network,
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
