"""`deepspeed run.py train RECIPE [--deepspeed_config JSON] [key=value …]`"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bd3_ds.config.check import unreached
from bd3_ds.config.ds_json import DEFAULT, check_optimizer, check_place, load_ds_json
from bd3_ds.config.load import load_recipe
from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import EXIT_STOPPED, report_errors_once
from bd3_ds.runtime.slurm import adopt_launcher, ranks_of_host
from bd3_ds.train.preflight import preflight


def main(argv: list[str]) -> int:
    """Check everything, then join the other ranks and train; EXIT_STOPPED where the run was asked to stop."""
    try:
        adopt_launcher(os.environ)
    finally:  # what it refuses, all ranks refuse
        report_errors_once(os.environ)
    parser = Parser(prog="run.py train", description="Train a recipe; continues where it stopped.")
    parser.add_argument("recipe", help="YAML file, such as configs/recipes/docs_pretrain.yaml")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT, help="memory and communication (ds_configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration on top of the recipe")
    arguments = parser.parse(argv)

    ds_json = load_ds_json(arguments.deepspeed_config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    run, facts = preflight(load_recipe(arguments.recipe, arguments.overrides), world_size)
    for note in unreached(run) if os.environ.get("RANK", "0") == "0" else []:
        print(f"note: {note}", file=sys.stderr, flush=True)
    check_optimizer(ds_json, run)
    check_place(ds_json, world_size, ranks_of_host(os.environ))

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed then need not warn that it found nothing better

    from bd3_ds.planning.micro_batch import with_micro_batch
    from bd3_ds.runtime.allocator import keep_freed_memory
    from bd3_ds.runtime.world import collective_timeout, join_world
    from bd3_ds.train.build import build
    from bd3_ds.train.closing import finished_before, nothing_to_do
    from bd3_ds.train.hardware import check_hardware
    from bd3_ds.train.run_lock import run_lock

    check_hardware(run, ds_json)
    torch.set_float32_matmul_precision(run.train.fp32_matmul)
    if not torch.cuda.is_available():
        keep_freed_memory()
    world = join_world(collective_timeout(run.guards.stall_seconds))
    try:
        with run_lock(Path(run.run_dir), world):
            run = with_micro_batch(run, ds_json, world.size, world.local_size)
            if (step := finished_before(run, world)) is None:
                step = build(run, facts, ds_json, world).train().step
            elif world.is_main:
                print(*nothing_to_do(run, step), sep="\n", file=sys.stderr, flush=True)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0 if step >= run.train.total_steps else EXIT_STOPPED
