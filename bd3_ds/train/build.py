"""Builds the Trainer of a checked configuration: fresh, or resumed from the newest complete checkpoint."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from bd3_ds.checkpoint.export import require_fit
from bd3_ds.checkpoint.manifest import Checkpoint
from bd3_ds.checkpoint.shards import Shards
from bd3_ds.checkpoint.store import Saver, newest_checkpoint
from bd3_ds.config.load import to_yaml
from bd3_ds.config.schema import RunConfig
from bd3_ds.data.data_facts import DataFacts
from bd3_ds.data.loader import Loader
from bd3_ds.data.pack import open_pack
from bd3_ds.data.rank_errors import of_all_ranks
from bd3_ds.data.same_packs import require_same_packs
from bd3_ds.data.share import Share
from bd3_ds.interop.init_from import find_start, starting_weights
from bd3_ds.model.build import Initializer, dit_config
from bd3_ds.model.dit import DiT
from bd3_ds.parallel.apply import apply_sequence_parallelism, prepare_layers
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import write_text
from bd3_ds.runtime.log import RunLog
from bd3_ds.runtime.peak_flops import peak_flops
from bd3_ds.runtime.run_dir import CHECKPOINTS, RUN_YAML
from bd3_ds.runtime.world import World
from bd3_ds.train.clip_search import ClipSearch
from bd3_ds.train.earlier import changes_in_words, earlier_runs
from bd3_ds.train.ema import Ema
from bd3_ds.train.engine import Engine
from bd3_ds.train.materialise import LoadedWeights, PlaceholderZeros, WeightSource
from bd3_ds.train.meter import Meter
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import Stepper
from bd3_ds.train.trainer import Trainer
from bd3_ds.train.validation import Validation


def _initial_weights(run: RunConfig, model: DiT, world: World) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of train.init_from, and a sentence on them. The main rank decides which export of a run is the
    newest.
    """
    place = world.on_main(lambda: str(find_start(run).path))
    chosen = dataclasses.replace(run, train=dataclasses.replace(run.train, init_from=place))

    def read() -> tuple[dict[str, torch.Tensor], str]:
        weights, sentence = starting_weights(find_start(chosen), model)
        require_fit(model, weights, place)
        return weights, sentence

    return world.together(read)


def build(run: RunConfig, facts: DataFacts, ds_json: dict[str, Any], world: World) -> Trainer:
    """The Trainer of a run as `preflight` gave it, with its last checkpoint loaded where there is one."""
    started, run_dir = time.perf_counter(), Path(run.run_dir)
    with torch.device("meta"):  # the engine gives each tensor its memory, where it stays
        model = DiT(dit_config(run.model, run.objective.name))
    messages: list[str] = []
    checkpoint = newest_checkpoint(run_dir / CHECKPOINTS, world, messages.append)
    train = run.train
    share = Share(
        world.rank, world.size, world.local_size, train.micro_batch, train.global_batch, train.sequence_parallel
    )
    if checkpoint is not None:
        _require_same_data(run, facts, checkpoint, share)
    sequence = apply_sequence_parallelism(model, run.train, world)
    engine = _engine(run, ds_json, world, model, checkpoint, messages)
    ema = Ema(engine, run.optim.ema_decay)
    state = TrainState() if checkpoint is None else _resume(checkpoint, engine, ema, world, messages)

    log = RunLog(run_dir, world.is_main, state.step)
    for line in messages:
        log.say(line)
    if state.step:
        log.say(f"continuing {run.run_dir} after step {state.step}")

    assert run.model.mask_id is not None
    peak = torch.tensor(peak_flops(world.device, run.train.precision), device=world.device, dtype=torch.float64)
    search = run.objective.clip_search
    counts = facts.train.token_counts if run.objective.frequency.power > 0 else None
    held_out = open_pack(run.eval.sets[search.set]) if search.method == "grid" else None
    stepper = Stepper(run, world, engine, ema, run.model.mask_id, counts, facts.scored_tokens, sequence)
    return Trainer(
        run=run,
        world=world,
        engine=engine,
        ema=ema,
        stepper=stepper,
        clip_search=ClipSearch(stepper, held_out),
        validation=Validation(stepper),
        loader=Loader(run.data, facts, share, state.samples),
        saver=Saver(
            run_dir / CHECKPOINTS,
            world,
            run.train.keep_checkpoints,
            async_save=run.train.checkpoint_async,
            keep_every=run.train.keep_every,
            say=log.say,
        ),
        log=log,
        meter=Meter(model.network, run, float(world.all_reduce(peak))),
        state=state,
        started=started,
    )


def _require_same_data(run: RunConfig, facts: DataFacts, checkpoint: Checkpoint, share: Share) -> None:
    try:
        require_same_packs(facts, checkpoint.state.get("loader", {}), run.run_dir)
    except UserError as error:
        raise of_all_ranks(error, share) from None


def _engine(
    run: RunConfig,
    ds_json: dict[str, Any],
    world: World,
    model: DiT,
    checkpoint: Checkpoint | None,
    messages: list[str],
) -> Engine:
    """The engine with the run's initial weights, or zeros until the checkpoint is loaded; run.yaml is written
    before.
    """
    run_dir = Path(run.run_dir)
    values: WeightSource = Initializer(model, run.seed) if checkpoint is None else PlaceholderZeros()
    if checkpoint is not None:
        messages += filter(None, [world.on_main(lambda: changes_in_words(earlier_runs(run_dir), run))])
    elif run.train.init_from is not None:
        weights, sentence = _initial_weights(run, model, world)
        values = LoadedWeights(weights)
        messages.append(sentence)
    if world.is_main:
        write_text(run_dir / RUN_YAML, to_yaml(run))
    prepare_layers(model, run.train)
    return Engine(model, run, ds_json, world, values)


def _resume(checkpoint: Checkpoint, engine: Engine, ema: Ema, world: World, messages: list[str]) -> TrainState:
    """Load the checkpoint into engine and moving average; returns its TrainState."""
    shards, saved = Shards(checkpoint.path), checkpoint.state
    engine.read(shards, saved["updates"])
    ema.read(shards, saved["ema_updates"])
    before, now = (checkpoint.manifest["world_size"], saved["zero_stage"]), (world.size, engine.stage)
    if before != now:
        messages.append(
            f"{checkpoint.path.name} was saved on {before[0]} ranks at ZeRO stage {before[1]}; going on with "
            f"{now[0]} at stage {now[1]}"
        )
    return TrainState.from_dict(saved)
