"""From a checked configuration to a run ready to step: fresh, or exactly where the last one stopped."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bd3_ds.checkpoint.export import export_name, fit_weights, write_export
from bd3_ds.checkpoint.store import Checkpoint, newest_checkpoint, save_checkpoint
from bd3_ds.config.check_data import packs
from bd3_ds.config.load import to_yaml
from bd3_ds.config.schema import BD3, RunConfig, block_size, block_sizes
from bd3_ds.data.loader import Loader, Share, of_all_ranks, require_same_packs
from bd3_ds.data.mixture import samples_of_epoch
from bd3_ds.data.pack import TOKENIZER_DIR, open_pack, read_manifest, read_token_counts
from bd3_ds.data.remote import pack_directory
from bd3_ds.model.build import initialise, network_of
from bd3_ds.model.dit import DiT
from bd3_ds.parallel.apply import prepare_layers
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import write_text
from bd3_ds.runtime.log import RunLog
from bd3_ds.runtime.world import World
from bd3_ds.train.clip_search import ClipSearch
from bd3_ds.train.ema import Ema
from bd3_ds.train.engine import Engine
from bd3_ds.train.meter import Meter, peak_flops
from bd3_ds.train.start import find_start, starting_weights
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import Stepper


@dataclass
class Trainer:
    """The parts of a run that the loop moves."""

    run: RunConfig
    world: World
    engine: Engine
    ema: Ema
    stepper: Stepper
    clip_search: ClipSearch
    loader: Loader
    log: RunLog
    meter: Meter
    state: TrainState

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.run.run_dir)

    def save(self) -> None:
        """Write and commit a checkpoint of this moment."""

        def write_shards(directory: Path, tag: str) -> None:
            self.engine.save(directory, tag)
            self.ema.save(directory / tag / ema_file(self.world.rank))

        self.log.flush()
        state = {
            **self.state.to_dict(),
            "zero_stage": self.engine.stage,
            "loader": self.loader.state(self.state.samples),
        }
        tag = export_name(self.state.step)
        keep = self.run.train.keep_checkpoints
        save_checkpoint(self.run_dir / "checkpoints", tag, state, write_shards, self.world, keep)

    def export(self) -> None:
        """Write the averaged weights with configuration and tokenizer, for evaluation and sampling."""
        weights = self.ema.gather(self.world)
        if self.world.is_main:
            name = export_name(self.state.step)
            tokenizer = pack_directory(self.run.data.train, self.run.data.cache) / TOKENIZER_DIR
            run = self._scored_as_trained()
            write_export(self.run_dir / "exports" / name, weights, run, tokenizer, self.state.step)
        self.world.barrier()

    def _scored_as_trained(self) -> RunConfig:
        """The run with the block size of the step just done, where it had but one, and the interval in force for it."""
        objective = self.run.objective
        sizes = block_sizes(self.run, max(0, self.state.step - 1))
        if objective.name == BD3 and len(sizes) == 1:
            objective = dataclasses.replace(objective, block_size=sizes[0])
        found = self.state.clip(block_size(self.run)).interval if len(sizes) > 1 else self.state.clip(sizes[0]).interval
        if found is not None:
            schedule = dataclasses.replace(objective.schedule, t_min=found[0], t_max=found[1])
            objective = dataclasses.replace(objective, schedule=schedule)
        return dataclasses.replace(self.run, objective=objective)


def build(run: RunConfig, ds_json: dict[str, Any], world: World) -> Trainer:
    """Network, engine, data and log of a run, and its last checkpoint where there is one."""
    run_dir = Path(run.run_dir)
    model = DiT(network_of(run.model, run.objective.name))
    initialise(model, run.seed)
    said: list[str] = []
    checkpoint = newest_checkpoint(run_dir / "checkpoints", world, said.append)
    share = Share(world.rank, world.size, world.local_size, run.train.micro_batch, run.train.global_batch)
    if checkpoint is not None:
        try:
            require_same_packs(run.data, checkpoint.state.get("loader", {}), run.run_dir)
        except UserError as error:
            raise of_all_ranks(error, share) from None
    if run.train.init_from is not None and checkpoint is None:
        start = find_start(run)
        weights, sentence = starting_weights(start, model)
        fit_weights(model, weights, str(start.path))
        said.append(sentence)
    if world.is_main:
        write_text(run_dir / "run.yaml", to_yaml(run))
    prepare_layers(model, run.train)
    engine = Engine(model, run, ds_json, world)
    ema = Ema(engine, run.optim.ema_decay)

    state = TrainState()
    if checkpoint is not None:
        _require_same_shards(checkpoint, engine.stage, world)
        engine.load(checkpoint.path.parent, checkpoint.path.name)
        ema.load(checkpoint.path / ema_file(world.rank))
        state = TrainState.from_dict(checkpoint.state)

    log = RunLog(run_dir, world.is_main, state.step)
    for line in said:
        log.say(line)
    if state.step:
        log.say(f"continuing {run.run_dir} after step {state.step}")

    assert run.model.mask_id is not None
    peak = torch.tensor(peak_flops(world.device, run.train.precision), device=world.device, dtype=torch.float64)
    search = run.objective.clip_search
    train_pack = pack_directory(run.data.train, run.data.cache)
    counts = read_token_counts(train_pack) if run.objective.frequency.power > 0 else None
    held_out = open_pack(run.eval.sets[search.set]) if search.method == "grid" else None
    stepper = Stepper(run, world, engine, ema, run.model.mask_id, counts, scored_tokens(run))
    return Trainer(
        run=run,
        world=world,
        engine=engine,
        ema=ema,
        stepper=stepper,
        clip_search=ClipSearch(stepper, held_out),
        loader=Loader(run.data, share, state.samples),
        log=log,
        meter=Meter(model.network, run, float(world.sum(peak))),
        state=state,
    )


def scored_tokens(run: RunConfig) -> float:
    """Scored tokens of a mean sequence of the run's packs: all but the first one and padding.

    Raises UserError where there are none.
    """
    manifests = [read_manifest(pack_directory(pack, run.data.cache)) for pack in packs(run.data)]
    samples = samples_of_epoch(run.data, [manifest.chunks for manifest in manifests])
    padding = sum(n * manifest.padding / manifest.chunks for n, manifest in zip(samples, manifests, strict=True))
    mean = run.data.length - 1 - padding / sum(samples)
    if mean <= 0:
        raise UserError(f"data.train={run.data.train} has nothing to learn: all but first tokens is padding")
    return mean


def _require_same_shards(checkpoint: Checkpoint, stage: int, world: World) -> None:
    """Shards fit the ranks and the ZeRO stage that wrote them."""
    ranks, saved_stage = checkpoint.manifest["world_size"], checkpoint.state["zero_stage"]
    if (ranks, saved_stage) != (world.size, stage):
        raise UserError(
            f"{checkpoint.path} was saved on {ranks} ranks at ZeRO stage {saved_stage}, this start has {world.size} at "
            f"stage {stage}; continue as it was, or start a new run_dir with "
            f"train.init_from={checkpoint.path.parents[1]}"
        )


def ema_file(rank: int) -> str:
    """Name of a rank's part of the averaged weights inside a checkpoint."""
    return f"ema-rank-{rank:05d}.safetensors"
