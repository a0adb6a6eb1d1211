"""A training step of this project, as a run takes it: Stepper, DeepSpeed engine and average, fed from memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from bd3_ds.config.load import load_recipe
from bd3_ds.config.schema import RunConfig
from bd3_ds.data.micro_batch import MicroBatch
from bd3_ds.model.build import dit_config, initialise
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.allocator import keep_freed_memory
from bd3_ds.runtime.world import World, join_world
from bd3_ds.train.ema import Ema
from bd3_ds.train.engine import Engine
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import Stepper, StepResult


@dataclass(frozen=True)
class Configuration:
    """The sizes of a run: model file, vocabulary, L, L' and sequences a step."""

    model: str
    vocab: int
    length: int
    block_size: int
    batch: int


CONFIGURATIONS = {
    "a": Configuration("tiny", 30523, 128, 4, 4),
    "b": Configuration("tiny", 50258, 1024, 16, 4),
    "c": Configuration("small", 50258, 256, 16, 2),
}


@lru_cache(maxsize=1)
def world() -> World:
    """This process alone."""
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as run.py has it: DeepSpeed then warns of nothing
        keep_freed_memory()
    joined = join_world()
    torch.set_num_threads(threads)  # DeepSpeed sets its own number
    return joined


def make_run(given: Configuration, objective: str, precision: str, *words: str) -> RunConfig:
    """The recipe of one step, with key=value words over it."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "recipe.yaml"
        size = f", block_size: {given.block_size}" if objective == "bd3" else ""
        recipe.write_text(
            f"include: [model/{given.model}]\nrun_dir: unused\n"
            f"model: {{vocab_size: {given.vocab}, mask_id: {given.vocab - 1}}}\n"
            f"data: {{train: unused, length: {given.length}}}\n"
            f"objective: {{name: {objective}{size}}}\n"
            f"train: {{global_batch: {given.batch}, micro_batch: {given.batch}, precision: {precision}}}\n"
        )
        return load_recipe(str(recipe), list(words))


def make_step(run: RunConfig, seed: int = 0) -> Callable[[], StepResult]:
    """One optimizer step on random tokens, all weights random; bf16 has fp32 master weights (ZeRO 1), fp32 is plain."""
    joined = world()
    model = DiT(dit_config(run.model, run.objective.name))
    initialise(model, run.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    stage = 1 if run.train.precision == "bf16" else 0
    engine = Engine(model, run, {"zero_optimization": {"stage": stage}, "steps_per_print": 10**9}, joined)
    assert run.model.vocab_size is not None and run.model.mask_id is not None
    stepper = Stepper(run, joined, engine, Ema(engine, run.optim.ema_decay), run.model.mask_id, None)
    generator = torch.Generator().manual_seed(seed)
    shape = (run.train.micro_batch, run.data.length)
    tokens = torch.randint(0, run.model.mask_id, shape, generator=generator)

    def batches() -> Iterator[MicroBatch]:
        while True:
            yield MicroBatch(tokens, np.arange(len(tokens)), 0.0)

    stream, state = batches(), TrainState(step=1)
    return lambda: stepper.step(stream, state, False)
