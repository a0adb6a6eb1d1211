"""`run.py check RECIPE`: the resolved run, what it costs, and one dry step, before any GPU-hour is spent."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.config.check import accumulation_steps, ranks_at_work, unreached
from bd3_ds.config.ds_json import DEFAULT, check_place, load_ds_json, zero_stage
from bd3_ds.config.load import load_recipe, to_yaml
from bd3_ds.config.schema import AR, RunConfig, block_size
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable, write_text
from bd3_ds.train.gpus import find_gpu
from bd3_ds.train.preflight import preflight

if TYPE_CHECKING:
    from bd3_ds.model.dit import Network


def main(argv: list[str]) -> int:
    """Print the plan; exit 2 with every problem found."""
    parser = Parser(prog="run.py check", description="Resolve and check a recipe without training it.")
    parser.add_argument("recipe")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT)
    parser.add_argument(
        "--world-size", type=at_least_one, default=1, metavar="N", help="ranks that the run is meant for"
    )
    parser.add_argument("--nodes", type=at_least_one, default=1, metavar="N", help="machines that the ranks are on")
    parser.add_argument("--gpu", metavar="NAME", help="plan for ranks of this kind, such as h100-80g; default: as here")
    parser.add_argument("--mfu", type=_share, metavar="X", help="share of the peak rate that training reaches: 0.4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the schedule's density, weight, masked share")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse(argv)

    for option, file, kind in (("--plot", arguments.plot, "PNG"), ("--json", arguments.json, "JSON")):
        if file is not None:
            if file.is_dir():
                raise UserError(f"{option} {file} is a directory; name a {kind} file")
            require_writable(file.resolve().parent)
    if arguments.world_size % arguments.nodes:
        raise UserError(
            f"--nodes={arguments.nodes} must divide --world-size={arguments.world_size}: all nodes have as many ranks"
        )
    if arguments.gpu is not None:
        find_gpu(arguments.gpu, "--gpu")
    ds_json = load_ds_json(arguments.deepspeed_config)
    run = preflight(load_recipe(arguments.recipe, arguments.overrides), arguments.world_size)
    check_place(ds_json, arguments.world_size)
    if arguments.plot is not None and run.objective.name == AR:
        raise UserError("--plot draws a noise schedule, and objective.name=ar has none")
    from bd3_ds.train.micro_batch import with_micro_batch

    per_node = arguments.world_size // arguments.nodes
    run = with_micro_batch(run, ds_json, arguments.world_size, per_node, arguments.gpu)
    described = plan(run, arguments.world_size, zero_stage(ds_json), here=arguments.gpu is None)
    made, lines = _resources(run, ds_json, arguments)
    print(to_yaml(run))
    for line in [*described, *(f"note: {note}" for note in unreached(run)), *lines]:
        print(f"# {line}")
    if arguments.json is not None:
        write_text(arguments.json, json.dumps({"recipe": arguments.recipe, **made}, indent=2) + "\n")
        print(f"# wrote {arguments.json}")
    if arguments.plot is not None:
        from bd3_ds.train.plot_schedule import plot_schedule

        plot_schedule(run, arguments.plot)
        print(f"# wrote {arguments.plot}")
    return 0


def plan(run: RunConfig, world_size: int, stage: int, here: bool = True) -> list[str]:
    """Batch arithmetic, parameters, cost, and the result of one dry step on one sequence, in sentences.

    Without `here` the run is meant for another machine: this one need not serve all that it asks for.
    """
    from bd3_ds.model.build import network_of
    from bd3_ds.train.hardware import check_hardware
    from bd3_ds.train.memory import parameter_count
    from bd3_ds.train.plan import flops_per_token

    if here:
        check_hardware(run)
    else:
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, attention="auto"))
    network = network_of(run.model, run.objective.name)
    parameters = parameter_count(network)
    size = block_size(run)
    flops, _ = flops_per_token(network, run)
    tokens = run.train.total_steps * run.train.global_batch * run.data.length
    return [
        f"objective {run.objective.name}, block size {size}: {run.data.length // size} blocks in "
        f"{run.data.length} tokens",
        *(
            f"from step {step:,} on: block size {' or '.join(map(str, sizes))}"
            for step, sizes in sorted(run.objective.block_schedule.items())
        ),
        *_masking(run),
        f"{parameters:,} parameters; ZeRO stage {stage} on {world_size} ranks",
        f"global batch {run.train.global_batch} = {run.train.micro_batch} x {accumulation_steps(run, world_size)} "
        f"micro-batches x {ranks_at_work(run, world_size)} = {run.train.global_batch * run.data.length:,} tokens",
        f"{run.train.total_steps:,} steps = {tokens:,} tokens, {flops / 1e6:,.1f} MFLOP a token, "
        f"{flops * tokens:.3g} FLOP in all",
        _dry_step(run, network, parameters),
    ]


def _dry_step(run: RunConfig, network: Network, parameters: int) -> str:
    """One sequence through a new model, where this machine can hold it: weights and gradients in fp32, and as much."""
    import psutil

    from bd3_ds.model.dit import DiT
    from bd3_ds.train.dry_step import dry_step

    needed, free = 16 * parameters, psutil.virtual_memory().available
    if needed > free:
        return f"no dry step: it takes about {needed / 2**30:,.0f} GiB, this machine has {free / 2**30:,.0f} GiB free"
    loss = dry_step(DiT(network), run)
    return f"dry step on one sequence: loss {loss:.4f} nats a token (a new model starts near ln V)"


def _resources(
    run: RunConfig, ds_json: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """The plan of memory, speed and bytes, and its sentences."""
    from bd3_ds.model.build import network_of
    from bd3_ds.train.plan import MFU, machine_of, make_plan, plan_lines

    machine = machine_of(arguments.gpu, run.train.precision, arguments.world_size // arguments.nodes)
    network = network_of(run.model, run.objective.name)
    mfu = MFU if arguments.mfu is None else arguments.mfu
    made = make_plan(run, network, ds_json, arguments.world_size, arguments.nodes, machine, mfu)
    return made, plan_lines(made)


def _share(text: str) -> float:
    """argparse type: a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' must lie in (0, 1]")
    return value


def _masking(run: RunConfig) -> list[str]:
    """What training masks, in a sentence; a warning where sampling's start is hardly shown."""
    if run.objective.name == AR:
        return []
    from bd3_ds.config.schema import block_sizes
    from bd3_ds.diffusion.proposal import make_proposal

    proposal = make_proposal(run.objective.schedule)
    effective = proposal.effective_share
    lines = [
        f"masking rates from {proposal.lowest:.3g} to {proposal.highest:.3g}; blocks weigh as if {effective:.1%} of "
        "them counted, and those alike"
    ]
    if effective < 0.1:
        lines.append(
            "warning: a few blocks carry nearly all of the weight; objective.schedule.defensive=0.1 would spread it"
        )
    for size in sorted({size for step in {0, *run.objective.block_schedule} for size in block_sizes(run, step)}):
        mean, covered, usual = proposal.mean_rate, proposal.all_masked_share(size), 1 / (size + 1)
        lines.append(
            f"block size {size}: {mean:.1%} of tokens are masked on average, {covered:.3g} of blocks wholly (unclipped "
            f"log-linear time: {usual:.3g})"
        )
        if covered < 0.01 * usual:
            lines.append(
                "warning: sampling starts from blocks of masks alone, which training hardly shows at block size "
                f"{size}; raise objective.schedule.t_max or objective.schedule.defensive"
            )
    return lines
