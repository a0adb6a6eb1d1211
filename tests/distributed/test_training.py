"""The trainer under DeepSpeed's launcher with two ranks: interrupted, or sharded otherwise, it is the same run."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bd3_ds.checkpoint.export import find_export, load_weights
from bd3_ds.checkpoint.shards import shard_file
from bd3_ds.train.run_lock import LOCK
from tests.helpers.launch import (
    curve,
    launch_training,
    start_training,
    stop,
    train,
    train_records,
    validation_curve,
    wait_for_step,
)
from tests.helpers.tiny import tiny_pack, tiny_run

STEPS = 60
HARD = ("train.precision=bf16", "train.activation_checkpointing=full", "model.dropout=0.1", "train.global_batch=8")
FP32 = ("train.global_batch=8", "train.checkpoint_every=6")
TAGS = {
    "train/loss",
    "train/nelbo",
    "train/ppl",
    "train/grad_norm",
    "train/lr",
    "perf/tokens_per_s",
    "perf/mfu",
    "perf/memory_gb",
    "perf/data_wait",
    "perf/tokens_per_s_wall",
    "perf/mfu_wall",
    "val/valid/nelbo",
    "val/valid/ppl",
}


@dataclass(frozen=True)
class Scene:
    """One recipe and its packs; every run goes to a directory of its own."""

    directory: Path
    recipe: Path

    def run_dir(self, name: str) -> Path:
        return self.directory / name

    def train(self, name: str, *words: str, **options: object) -> str:
        """Train to the end in `name`; returns the console."""
        return train(self.recipe, f"run_dir={self.run_dir(name)}", *words, **options)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The newest exported EMA."""
        return load_weights(find_export(str(self.run_dir(name))))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    directory = tmp_path_factory.mktemp("training")
    tiny_run(directory)
    return Scene(directory, directory / "recipe.yaml")


@pytest.fixture(scope="module")
def one_rank(scene: Scene) -> str:
    """The reference: no ZeRO, fp32, one rank, no accumulation. 12 steps."""
    scene.train("one", *FP32, "train.total_steps=12", "train.micro_batch=8", ranks=1, ds_config="zero0")
    return "one"


def interrupt_and_continue(scene: Scene, ds_config: str, *words: str) -> None:
    """Two runs, one of them asked to stop on its way: the same records and the same export, to the last bit."""
    words = (*HARD, f"train.total_steps={STEPS}", "train.checkpoint_every=1000", "train.export_every=1000", *words)
    words = (*words, "train.validate_every=3")
    whole, parts = f"whole-{ds_config}", f"parts-{ds_config}"
    scene.train(whole, *words, ds_config=ds_config)
    run_dir = scene.run_dir(parts)
    with start_training(scene.recipe, f"run_dir={run_dir}", *words, ds_config=ds_config) as process:
        wait_for_step(run_dir, 5, process)
        stop(process, signal.SIGTERM)
    saved = len(train_records(run_dir))
    assert 5 <= saved < STEPS
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == [f"step-{saved:08d}"]
    assert not (run_dir / "records/finished.json").exists()

    said = scene.train(parts, *words, ds_config=ds_config)
    assert f"continuing {run_dir} after step {saved}" in said
    assert curve(run_dir) == curve(scene.run_dir(whole))
    assert len(curve(run_dir)) == STEPS
    validated = validation_curve(run_dir)
    assert sorted(validated) == list(range(3, STEPS + 1, 3)) and validated == validation_curve(scene.run_dir(whole))
    same(scene.weights(parts), scene.weights(whole), torch.equal)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], equal: Callable[[Tensor, Tensor], bool]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not equal(ours[name], theirs[name])] == []


def test_interrupted_run_is_the_uninterrupted_one(scene):
    """ZeRO-2, bf16, recomputed layers, accumulation, dropout, and data-loading processes that the signal reaches."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupt_and_continue(scene, "zero2", "data.workers=1")

    events = EventAccumulator(str(scene.run_dir("parts-zero2") / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= TAGS
    assert all(f"loss_by_masking_rate/{i / 10:.1f}-{(i + 1) / 10:.1f}" in tags for i in range(10))
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    losses = [line["loss"] for line in train_records(scene.run_dir("parts-zero2"))]
    assert [point.value for point in points] == pytest.approx(losses, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ds_config", ["zero1", "zero3"])
def test_interrupted_run_is_the_uninterrupted_one_at_stage(scene, ds_config):
    interrupt_and_continue(scene, ds_config)


def agrees_with_one_rank(scene: Scene, one_rank: str, ds_config: str) -> None:
    name = f"two-{ds_config}"
    scene.train(name, *FP32, "train.total_steps=12", "train.micro_batch=2", ds_config=ds_config)
    ours, theirs = curve(scene.run_dir(name)), curve(scene.run_dir(one_rank))
    assert len(ours) == 12
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step
    same(scene.weights(name), scene.weights(one_rank), lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-5))

    whole = sum(tensor.numel() for tensor in scene.weights(name).values())
    checkpoint = scene.run_dir(name) / "checkpoints/step-00000012"
    files = [load_file(checkpoint / shard_file(rank)) for rank in range(2)]
    held = [sum(part.numel() for name, part in file.items() if name.startswith("ema/")) for file in files]
    assert sum(held) == whole
    if ds_config != "zero0":
        assert max(held) < 0.51 * whole


def test_world_size_and_sharding_do_not_change_the_run(scene, one_rank):
    """Two ranks at ZeRO-3 in micro-batches of 2 against one rank without ZeRO in one batch of 8; EMA in halves."""
    agrees_with_one_rank(scene, one_rank, "zero3")


def written(run_dir):
    """When each file was last written, but for the lock, which every start holds for a moment."""
    return {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != LOCK}


def test_finished_run_stays_as_it_is_and_can_be_prolonged(scene, one_rank):
    run_dir = scene.run_dir(one_rank)
    words = (*FP32, "train.micro_batch=8")
    before = (run_dir / "records/train.jsonl").read_bytes()
    weights = scene.weights(one_rank)
    files = written(run_dir)
    said = scene.train(one_rank, *words, "train.total_steps=12", ranks=1, ds_config="zero0")
    assert (run_dir / "records/train.jsonl").read_bytes() == before
    assert (run_dir / "records/finished.json").is_file()
    assert files == written(run_dir)
    assert f"{run_dir} finished at step 12, and train.total_steps=12 asks for no more: nothing to do" in said
    assert "train.total_steps=N with N above 12 goes on from there" in said
    same(scene.weights(one_rank), weights, torch.equal)

    scene.train(one_rank, *words, "train.total_steps=15", ranks=1, ds_config="zero0")
    assert (run_dir / "records/train.jsonl").read_bytes().startswith(before)
    assert len(curve(run_dir)) == 15
    assert find_export(str(run_dir)).step == 15


def test_continuing_on_another_pack_is_refused_with_a_sentence(scene, one_rank):
    run_dir = scene.run_dir(one_rank)
    before = (run_dir / "run.yaml").read_bytes()
    other = tiny_pack(scene.directory / "other", chunks=64, seed=2)
    words = (f"run_dir={run_dir}", *FP32, "train.total_steps=20", "train.micro_batch=8", f"data.train={other}")
    refused = launch_training(scene.recipe, *words, ranks=1, ds_config="zero0")
    assert refused.returncode == 2
    errors = [line for line in refused.stdout.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"data.train: '{other}' is another pack" in errors[0], refused.stdout
    assert "Traceback" not in refused.stdout
    assert (run_dir / "run.yaml").read_bytes() == before


def test_a_run_continues_on_other_ranks_and_at_another_stage(scene, one_rank):
    """Saved by one rank without ZeRO, read by two at stage 3, whose weights are then in halves."""
    run_dir = scene.run_dir("moved")
    shutil.copytree(scene.run_dir(one_rank), run_dir)
    before = len(curve(run_dir))
    words = (*FP32, "train.micro_batch=2", f"train.total_steps={before + 6}")
    said = scene.train("moved", *words, ds_config="zero3")
    assert f"step-{before:08d} was saved on 1 ranks at ZeRO stage 0; going on with 2 at stage 3" in said
    scene.train(one_rank, *FP32, "train.micro_batch=8", f"train.total_steps={before + 6}", ranks=1, ds_config="zero0")
    ours, theirs = curve(run_dir), curve(scene.run_dir(one_rank))
    assert len(ours) == before + 6
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step
    same(scene.weights("moved"), scene.weights(one_rank), lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-5))
