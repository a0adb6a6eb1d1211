"""`run.py check RECIPE`: the resolved run, what it costs, and one dry step, before any GPU-hour is spent."""

from __future__ import annotations

from pathlib import Path

from bd3_ds.config.check import accumulation_steps
from bd3_ds.config.ds_json import DEFAULT, load_ds_json, zero_stage
from bd3_ds.config.load import load_recipe, to_yaml
from bd3_ds.config.schema import RunConfig, block_size
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.train.preflight import preflight


def main(argv: list[str]) -> int:
    """Print the plan; exit 2 with every problem found."""
    parser = Parser(prog="run.py check", description="Resolve and check a recipe without training it.")
    parser.add_argument("recipe")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT)
    parser.add_argument(
        "--world-size", type=at_least_one, default=1, metavar="N", help="ranks that the run is meant for"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse(argv)

    ds_json = load_ds_json(arguments.deepspeed_config)
    run = preflight(load_recipe(arguments.recipe, arguments.overrides), arguments.world_size)
    lines = plan(run, arguments.world_size, zero_stage(ds_json))
    print(to_yaml(run))
    for line in lines:
        print(f"# {line}")
    return 0


def plan(run: RunConfig, world_size: int, stage: int) -> list[str]:
    """Batch arithmetic, parameters, cost, and the result of one dry step on one sequence, in sentences."""
    from bd3_ds.model.build import network_of
    from bd3_ds.model.dit import DiT
    from bd3_ds.model.flops import training_flops_per_sequence
    from bd3_ds.train.dry_step import dry_step
    from bd3_ds.train.hardware import check_hardware

    check_hardware(run)
    network = network_of(run.model, run.objective.name)
    model = DiT(network)
    parameters = sum(p.numel() for p in model.parameters())
    size = block_size(run)
    flops = training_flops_per_sequence(network, run.objective.name, run.data.length, size) / run.data.length
    tokens = run.train.total_steps * run.train.global_batch * run.data.length
    loss = dry_step(model, run)
    return [
        f"objective {run.objective.name}, block size {size}: {run.data.length // size} blocks in "
        f"{run.data.length} tokens",
        f"{parameters:,} parameters; ZeRO stage {stage} on {world_size} ranks",
        f"global batch {run.train.global_batch} = {run.train.micro_batch} x {accumulation_steps(run, world_size)} "
        f"micro-batches x {world_size} ranks = {run.train.global_batch * run.data.length:,} tokens",
        f"{run.train.total_steps:,} steps = {tokens:,} tokens, {flops / 1e6:,.1f} MFLOP a token, "
        f"{flops * tokens:.3g} FLOP in all",
        f"dry step on one sequence: loss {loss:.4f} nats a token (a new model starts near ln V)",
    ]
