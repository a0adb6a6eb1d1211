"""A few steps of training on every rank, beside an average of whole weights that nobody shards; for one test.

    deepspeed … tests/helpers/average_probe.py RECIPE DEEPSPEED_JSON

Prints on the main rank: the largest difference between the sharded average and the whole one, the numbers that each
rank's part has, and the numbers of the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from bd3_ds.config.ds_json import load_ds_json
from bd3_ds.config.load import load_recipe
from bd3_ds.runtime.errors import leave
from bd3_ds.runtime.world import World, join_world
from bd3_ds.train.build import build
from bd3_ds.train.engine import Engine
from bd3_ds.train.preflight import preflight

STEPS = 6


def masters(engine: Engine, world: World) -> dict[str, Tensor]:
    """The whole fp32 weights, on every rank."""
    parts = [(f.name, f.start, f.weights.clone()) for group in engine.masters.groups() for f in group]
    whole = {name: torch.empty(shape).flatten() for name, shape in engine.shapes.items()}
    for share in world.all_gather_object(parts):
        for name, start, values in share:
            whole[name][start : start + len(values)] = values
    return whole


def main(recipe: str, ds_config: str) -> int:
    """Train, average twice, compare."""
    ds_json = load_ds_json(Path(ds_config))
    run, facts = preflight(load_recipe(recipe, []), 2)
    world = join_world()
    trainer = build(run, facts, ds_json, world)
    engine, ema = trainer.engine, trainer.ema
    average = masters(engine, world)
    batches = iter(trainer.loader)
    for update in range(STEPS):
        trainer.stepper.step(batches, trainer.state)
        trainer.state = trainer.state.advance(run.train.global_batch, run.data.length)
        decay = min(ema.decay, (1 + update) / (10 + update))
        for name, values in masters(engine, world).items():
            average[name].lerp_(values, 1 - decay)
    held = world.all_gather_object(sum(values.numel() * values.element_size() for _, values in ema.pieces()))
    ours = ema.gather(world)
    if world.is_main:
        difference = max(float((ours[name].flatten() - average[name]).abs().max()) for name in average)
        print("RESULT", json.dumps([difference, held, sum(values.numel() for values in average.values())]), flush=True)
    world.barrier()
    return 0


if __name__ == "__main__":
    leave(main(*[word for word in sys.argv[1:] if not word.startswith("--local_rank")]))
