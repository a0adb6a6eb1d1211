"""`run.py check RECIPE`: the resolved run, what it costs, and one dry step, before any GPU-hour is spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.config.check import accumulation_steps, ranks_at_work
from bd3_ds.config.ds_json import DEFAULT, load_ds_json, zero_stage
from bd3_ds.config.load import load_recipe, to_yaml
from bd3_ds.config.schema import AR, RunConfig, block_size
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable
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
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the schedule's density, weight, masked share")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse(argv)

    if arguments.plot is not None:
        if arguments.plot.is_dir():
            raise UserError(f"--plot {arguments.plot} is a directory; name a PNG file")
        require_writable(arguments.plot.resolve().parent)
    ds_json = load_ds_json(arguments.deepspeed_config)
    run = preflight(load_recipe(arguments.recipe, arguments.overrides), arguments.world_size)
    if arguments.plot is not None and run.objective.name == AR:
        raise UserError("--plot draws a noise schedule, and objective.name=ar has none")
    lines = plan(run, arguments.world_size, zero_stage(ds_json))
    print(to_yaml(run))
    for line in lines:
        print(f"# {line}")
    if arguments.plot is not None:
        from bd3_ds.train.plot_schedule import plot_schedule

        plot_schedule(run, arguments.plot)
        print(f"# wrote {arguments.plot}")
    return 0


def plan(run: RunConfig, world_size: int, stage: int) -> list[str]:
    """Batch arithmetic, parameters, cost, and the result of one dry step on one sequence, in sentences."""
    from bd3_ds.model.build import network_of
    from bd3_ds.model.dit import DiT
    from bd3_ds.train.dry_step import dry_step
    from bd3_ds.train.hardware import check_hardware

    check_hardware(run)
    network = network_of(run.model, run.objective.name)
    model = DiT(network)
    parameters = sum(p.numel() for p in model.parameters())
    size = block_size(run)
    flops = _flops_per_token(network, run)
    tokens = run.train.total_steps * run.train.global_batch * run.data.length
    loss = dry_step(model, run)
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
        f"dry step on one sequence: loss {loss:.4f} nats a token (a new model starts near ln V)",
    ]


def _flops_per_token(network: Network, run: RunConfig) -> float:
    """Training FLOPs of a clean token, the mean over the stages of a block size that changes."""
    from bd3_ds.config.schema import block_sizes
    from bd3_ds.diffusion.proposal import make_proposal
    from bd3_ds.model.flops import training_flops_per_sequence

    masked = make_proposal(run.objective.schedule).mean_rate
    length, total, steps = run.data.length, 0.0, run.train.total_steps
    begins = sorted({0, *run.objective.block_schedule})
    for begin, end in zip(begins, [*begins[1:], steps], strict=True):
        sizes = block_sizes(run, begin)
        name, views = run.objective.name, run.objective.views
        each = [training_flops_per_sequence(network, name, length, size, masked, views) for size in sizes]
        total += (end - begin) / steps * sum(each) / len(each)
    return total / length


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
