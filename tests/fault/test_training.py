"""Whatever is killed or torn, the same command ends with the undisturbed run's numbers, to the last bit."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from bd3_ds.checkpoint import store
from bd3_ds.checkpoint.export import find_export, load_weights
from bd3_ds.checkpoint.shards import Shards, piece, shard_file
from bd3_ds.checkpoint.store import MANIFEST, Saver, complete_checkpoints, newest_checkpoint
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World
from tests.helpers.launch import (
    curve,
    launch_training,
    rank_process,
    start_training,
    train,
    train_records,
    wait_for_end,
    wait_for_step,
    wait_until,
)
from tests.helpers.tiny import tiny_run

STEPS = 30
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SHARD = shard_file(0)


def save(directory: Path, step: int, keep: int = 2, async_save: bool = False) -> None:
    saver = Saver(directory, ALONE, keep, async_save)
    saver.start(f"step-{step:08d}", {"step": step}, [(piece("weights", "w", 0), torch.full((300,), float(step)))])
    saver.finish()


def newest_step(directory: Path, said: list[str]) -> int | None:
    checkpoint = newest_checkpoint(directory, ALONE, said.append)
    return None if checkpoint is None else checkpoint.state["step"]


@pytest.mark.parametrize("name", [SHARD, MANIFEST])
@pytest.mark.parametrize("damage", ["deleted", "emptied", "truncated", "altered"])
def test_damaged_checkpoint_is_passed_over_and_said(tmp_path, name, damage):
    save(tmp_path, 10)
    save(tmp_path, 20)
    said: list[str] = []
    assert newest_step(tmp_path, said) == 20 and said == []

    file = tmp_path / "step-00000020" / name
    content = file.read_bytes()
    broken = {"emptied": b"", "truncated": content[:-7], "altered": b"\0" + content[1:]}
    file.unlink() if damage == "deleted" else file.write_bytes(broken[damage])
    assert newest_step(tmp_path, said) == 10
    assert len(said) == 1 and "step-00000020" in said[0] and "passed over" in said[0]


def test_nothing_complete_is_a_fresh_start(tmp_path):
    said: list[str] = []
    assert newest_step(tmp_path / "absent", said) is None and said == []
    save(tmp_path, 10)
    (tmp_path / "step-00000010" / MANIFEST).unlink()
    assert newest_step(tmp_path, said) is None and len(said) == 1


def test_a_later_format_is_refused_rather_than_overwritten(tmp_path):
    save(tmp_path, 10)
    manifest = tmp_path / "step-00000010" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(UserError, match="checkpoint format 3; this version reads format 2"):
        newest_step(tmp_path, [])


@pytest.mark.parametrize("async_save", [False, True])
def test_a_checkpoint_holds_what_the_tensors_were_when_it_was_started(tmp_path, async_save):
    numbers = torch.arange(2_000_000, dtype=torch.float32)
    saver = Saver(tmp_path, ALONE, 2, async_save)
    saver.start("step-00000001", {"step": 1}, [(piece("weights", "w", 0), numbers)])
    numbers.zero_()  # the next update
    assert saver.pending == async_save
    assert len(complete_checkpoints(tmp_path)) == (not async_save)
    saver.finish()
    assert not saver.pending and not saver.busy
    (checkpoint,) = complete_checkpoints(tmp_path)
    read = torch.empty(2_000_000)
    Shards(checkpoint.path).read("weights", "w", 0, read)
    assert torch.equal(read, torch.arange(2_000_000, dtype=torch.float32))


@pytest.mark.parametrize("async_save", [False, True])
def test_a_failed_save_leaves_the_last_one_alone(tmp_path, async_save):
    """A limit on the size of files is met in the middle of writing, as a full disk is."""
    save(tmp_path, 10, keep=1)
    saver = Saver(tmp_path, ALONE, 1, async_save)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match=r"cannot save .*step-00000020: .*; the newest checkpoint is step-00000010"):
            saver.start("step-00000020", {"step": 20}, [(piece("weights", "w", 0), torch.zeros(100_000))])
            saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    said: list[str] = []
    assert newest_step(tmp_path, said) == 10 and said == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_save_that_dies_does_not_count_as_the_one_before(tmp_path, monkeypatch):
    """Whatever ends the thread that writes, as lack of memory does, nothing is committed and nothing pruned."""

    def dies(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the error itself is on the console otherwise
    saver = Saver(tmp_path, ALONE, keep=1, async_save=True)
    saver.start("step-00000010", {"step": 10}, [(piece("weights", "w", 0), torch.zeros(300))])
    saver.finish()
    monkeypatch.setattr(store, "write_shard", dies)
    saver.start("step-00000020", {"step": 20}, [(piece("weights", "w", 0), torch.zeros(300))])
    with pytest.raises(UserError, match=r"its shard was not written .* the newest checkpoint is step-00000010"):
        saver.finish()
    assert newest_step(tmp_path, []) == 10


def test_retention_counts_only_what_the_run_continues_from(tmp_path):
    """A damaged later checkpoint must not push out the good one that was just saved."""
    save(tmp_path, 10, keep=1)
    save(tmp_path, 30, keep=2)
    damaged = tmp_path / "step-00000030" / SHARD
    damaged.write_bytes(b"x" * damaged.stat().st_size)  # the size is right, the content is not
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000005")
    (tmp_path / "step-00000005" / SHARD).unlink()  # torn long ago
    save(tmp_path, 20, keep=1)
    assert [checkpoint.path.name for checkpoint in complete_checkpoints(tmp_path)] == ["step-00000020"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_retention_keeps_some_for_good(tmp_path):
    saver = Saver(tmp_path, ALONE, 2, async_save=False, keep_every=20)
    for step in (10, 20, 30, 40, 50, 60, 70):
        saver.start(f"step-{step:08d}", {"step": step}, [(piece("weights", "w", 0), torch.zeros(3))])
    assert [checkpoint.state["step"] for checkpoint in complete_checkpoints(tmp_path)] == [20, 40, 60, 70]


WORDS = (
    "train.activation_checkpointing=full",
    "model.dropout=0.1",
    "train.global_batch=8",
    f"train.total_steps={STEPS}",
    "train.export_every=1000",
)
SAVE = "train.checkpoint_every=1"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a recipe and of the undisturbed run `calm`."""
    directory = tmp_path_factory.mktemp("fault")
    tiny_run(directory)
    train(directory / "recipe.yaml", f"run_dir={directory / 'calm'}", *WORDS, SAVE)
    return directory


def assert_same_run(calm: Path, run_dir: Path) -> None:
    assert curve(run_dir) == curve(calm / "calm")
    assert len(curve(run_dir)) == STEPS
    ours, theirs = (load_weights(find_export(str(place))) for place in (run_dir, calm / "calm"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kill_9_in_the_middle_of_saving_then_a_torn_checkpoint(calm):
    recipe, run_dir = calm / "recipe.yaml", calm / "killed"
    checkpoints, words = run_dir / "checkpoints", (f"run_dir={run_dir}", *WORDS, SAVE)

    def saving() -> bool:
        later = (path for path in checkpoints.glob("step-*") if path.name > "step-00000005")
        return any(not (path / MANIFEST).exists() for path in later)

    with start_training(recipe, *words) as process:
        wait_for_step(run_dir, 5, process)
        victim = rank_process(process, random.randrange(2))
        wait_until(saving, 60, "a checkpoint in the making")
        victim.kill()
        assert wait_for_end(process, 90) != 0
    said: list[str] = []
    step = newest_step(checkpoints, said)
    assert step is not None and 5 <= step < STEPS

    out = train(recipe, *words)
    assert f"continuing {run_dir} after step {step}" in out
    assert all(line in out for line in said)
    assert_same_run(calm, run_dir)

    torn = checkpoints / f"step-{STEPS:08d}" / shard_file(1)
    torn.write_bytes(torn.read_bytes()[:1000])
    out = train(recipe, *words)
    assert f"checkpoint step-{STEPS:08d} is incomplete and is passed over" in out
    assert f"continuing {run_dir} after step {STEPS - 1}" in out
    assert_same_run(calm, run_dir)


@pytest.mark.slow
def test_death_of_a_data_loading_process_ends_the_run(calm):
    """It must not leave ranks waiting for one another; the command then continues."""
    recipe, run_dir = calm / "recipe.yaml", calm / "loader-killed"
    words = (f"run_dir={run_dir}", *WORDS, SAVE, "data.workers=1")
    with start_training(recipe, *words) as process:
        wait_for_step(run_dir, 3, process)
        rank = rank_process(process, 0)
        loading = [child for child in rank.children() if child.cmdline() == rank.cmdline()]
        assert loading
        loading[0].kill()
        assert wait_for_end(process, 90) != 0
    train(recipe, *words)
    assert_same_run(calm, run_dir)


def test_error_on_one_rank_ends_the_run(calm):
    """With data-loading processes alive, which an ending trainer has to end too: rank 0 fails to save, rank 1 waits."""
    run_dir = calm / "unsaved"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("not a directory")
    failed = launch_training(
        calm / "recipe.yaml", f"run_dir={run_dir}", *WORDS, "data.workers=2", "train.checkpoint_every=3", timeout=90
    )
    assert failed.returncode != 0
    assert f"error: cannot write to {run_dir / 'checkpoints'}" in failed.stdout
    assert len(train_records(run_dir)) == 3
