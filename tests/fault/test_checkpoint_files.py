"""What goes wrong with files of checkpoints: removals that fail, listings that differ, power cuts, users' folders."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_ds.checkpoint import shards as shards_module
from bd3_ds.checkpoint.shards import Shards, piece, shard_file
from bd3_ds.checkpoint.store import MANIFEST, Saver, complete_checkpoints, newest_checkpoint
from bd3_ds.runtime import files
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World
from tests.helpers.ranks import on_ranks

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SHARD = shard_file(0)


def save(saver: Saver, step: int) -> None:
    saver.start(f"step-{step:08d}", {"step": step}, [(piece("weights", "w", 0), torch.full((300,), float(step)))])
    saver.finish()


def complete(directory: Path) -> list[int]:
    return [checkpoint.state["step"] for checkpoint in complete_checkpoints(directory)]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class BusyFiles:
    """Refuses to remove `name` of step 10, as a file server does where another machine has it open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int):
        self.busy = True
        for call in ("unlink", "rmdir", "remove"):
            monkeypatch.setattr(os, call, self._refusing(getattr(os, call), name, number))

    def _refusing(self, call: Any, name: str, number: int) -> Any:
        def refusing(path: Any, *args: Any, **options: Any) -> None:
            place = os.fspath(path)
            if self.busy and place.endswith(name) and ("step-00000010" in place or options.get("dir_fd")):
                raise OSError(number, os.strerror(number), os.fspath(path))
            call(path, *args, **options)

        return refusing


@pytest.mark.parametrize(
    ("name", "number", "left"),
    [
        (MANIFEST, errno.EBUSY, [10, 20]),  # wholly there
        (SHARD, errno.EBUSY, [20]),
        ("step-00000010", errno.ENOTEMPTY, [20]),
    ],
)
def test_an_old_checkpoint_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch, name, number, left):
    said: list[str] = []
    saver = Saver(tmp_path, ALONE, 1, async_save=False, say=said.append)
    save(saver, 10)
    server = BusyFiles(monkeypatch, name, number)
    save(saver, 20)
    assert complete(tmp_path) == left
    assert said == [
        f"cannot remove the old checkpoint {tmp_path / 'step-00000010'}: {os.strerror(number)}; the run goes on, and "
        "each later save tries again"
    ]
    save(saver, 25)  # the run goes on; the same is not said again
    assert len(said) == 1
    server.busy = False
    save(saver, 30)
    assert names(tmp_path) == ["step-00000030"] and complete(tmp_path) == [30]


def test_files_that_stay_of_an_older_checkpoint_of_the_same_step_are_no_part_of_the_new_one(tmp_path, monkeypatch):
    saver = Saver(tmp_path, ALONE, 2, async_save=False)
    save(saver, 10)
    shutil.copy(tmp_path / "step-00000010" / SHARD, tmp_path / "step-00000010" / shard_file(1))  # of more ranks
    BusyFiles(monkeypatch, shard_file(1), errno.EBUSY)
    save(saver, 10)
    (checkpoint,) = complete_checkpoints(tmp_path)
    assert (checkpoint.path / shard_file(1)).exists() and shard_file(1) not in checkpoint.manifest["files"]
    read = torch.empty(300)
    Shards(checkpoint.path).read("weights", "w", 0, read)
    assert torch.equal(read, torch.full((300,), 10.0))


def test_what_users_keep_beside_checkpoints_is_neither_removed_nor_loaded(tmp_path):
    saver = Saver(tmp_path, ALONE, 1, async_save=False)
    save(saver, 10)
    for name in ("step-00000010-backup", "step-best", "step-10"):
        shutil.copytree(tmp_path / "step-00000010", tmp_path / name)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000020").mkdir()  # begun by a run that was killed
    (tmp_path / "step-00000020" / SHARD).touch()
    save(saver, 30)
    kept = ["step-00000005", "step-00000010-backup", "step-00000030", "step-10", "step-best"]
    assert names(tmp_path) == kept and complete(tmp_path) == [30]
    shutil.rmtree(tmp_path / "step-00000030")
    said: list[str] = []
    assert newest_checkpoint(tmp_path, ALONE, said.append) is None
    assert said == ["checkpoint step-00000005 is incomplete and is passed over"]


def test_more_than_eight_digits_sort_as_numbers(tmp_path):
    saver = Saver(tmp_path, ALONE, 1, async_save=False)
    save(saver, 99_999_999)
    save(saver, 100_000_000)
    assert complete(tmp_path) == [100_000_000]


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    """Checkpoints of steps 200 and 300 on two ranks."""

    def write(world: World) -> None:
        saver = Saver(tmp_path, world, 2, async_save=True)
        for step in (200, 300):
            part = torch.full((150,), float(step))
            saver.start(f"step-{step:08d}", {"step": step}, [(piece("weights", "w", 150 * world.rank), part)])
        saver.finish()

    on_ranks(2, write)
    assert complete(tmp_path) == [200, 300]
    return tmp_path


def _forget(name: str) -> None:
    """Have this process list directories as if `name` were not there yet; asked for by its path, it is."""
    scandir, listdir = os.scandir, os.listdir

    class Stale:
        def __init__(self, path: Any):
            self._entries = scandir(path)

        def __enter__(self) -> Iterator[Any]:
            return iter(self)

        def __exit__(self, *_: object) -> None:
            self._entries.close()

        def __iter__(self) -> Iterator[Any]:
            return (entry for entry in self._entries if entry.name != name)

    os.scandir = Stale  # type: ignore[assignment, misc]
    os.listdir = lambda path=".": [entry for entry in listdir(path) if entry != name]  # type: ignore[assignment]


@pytest.mark.parametrize(("stale", "expected"), [(1, 300), (0, 200)])
def test_ranks_whose_listings_differ_load_one_checkpoint(two_checkpoints, stale, expected):
    """The main rank decides; before, the rank that saw fewer left the others waiting for it."""

    def load(world: World) -> tuple[int, list[str], list[float]]:
        if world.rank == stale:
            _forget("step-00000300")
        said: list[str] = []
        checkpoint = newest_checkpoint(two_checkpoints, world, said.append)
        assert checkpoint is not None
        read = torch.empty(300)
        Shards(checkpoint.path).read("weights", "w", 0, read)
        return checkpoint.state["step"], said, read.unique().tolist()

    assert on_ranks(2, load) == [(expected, [], [float(expected)])] * 2


def test_a_rank_that_cannot_see_a_file_has_all_pass_over_it(two_checkpoints, tmp_path_factory, monkeypatch):
    """Another machine's disk, or a server that is much too late."""
    monkeypatch.setattr(files, "LATE", 0.5)
    elsewhere = tmp_path_factory.mktemp("other") / "checkpoints"
    shutil.copytree(two_checkpoints, elsewhere)
    shutil.rmtree(elsewhere / "step-00000300")

    def load(world: World) -> tuple[int, int]:
        said: list[str] = []
        checkpoint = newest_checkpoint(elsewhere if world.rank else two_checkpoints, world, said.append)
        assert checkpoint is not None
        return checkpoint.state["step"], len(said)

    assert on_ranks(2, load) == [(200, 1)] * 2


def test_a_main_rank_that_cannot_begin_or_commit_ends_all_ranks_with_its_sentence(tmp_path):
    def begin(world: World) -> None:
        Saver(tmp_path / "file", world, 1, async_save=True).start("step-00000001", {"step": 1}, [])

    def commit(world: World) -> None:
        saver = Saver(tmp_path / "checkpoints", world, 1, async_save=True)
        saver.start("step-00000001", {"step": 1}, [])
        if world.is_main:
            (tmp_path / "checkpoints" / "step-00000001" / "index.json").mkdir()
        saver.finish()

    (tmp_path / "file").write_text("not a directory")
    for work, sentence in ((begin, "cannot write to"), (commit, r"cannot save .*; the newest checkpoint is none")):
        for error in on_ranks(2, work):
            with pytest.raises(UserError, match=sentence):
                raise error


def test_a_rank_opens_only_the_files_that_it_reads_from(tmp_path, monkeypatch):
    """16 ranks, each with its part of two tensors; an earlier version's checkpoint, without an index, is read too."""
    import safetensors

    parts = {rank: torch.arange(10.0) + 10 * rank for rank in range(16)}
    entries = {}
    for rank, part in parts.items():
        pieces = {piece(kind, "w", 10 * rank): part.clone() for kind in ("weights", "ema")}
        shards_module.write_shard(tmp_path / shard_file(rank), pieces)
        entries[shard_file(rank)] = shards_module.layout(pieces)
    shards_module.write_index(tmp_path / "index.json", entries)
    opened: list[str] = []
    safe_open = safetensors.safe_open

    def counting(path: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return safe_open(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", counting)
    for known, expected in (([*entries, "index.json"], [shard_file(2), shard_file(3)]), (list(entries), list(entries))):
        files.write_json(tmp_path / MANIFEST, {"format": 2, "files": {name: {} for name in known}})
        opened.clear()
        read = Shards(tmp_path)
        for kind in ("weights", "ema"):
            into = torch.empty(20)
            read.read(kind, "w", 20, into)
            assert torch.equal(into, torch.arange(20.0, 40.0))
        assert opened == expected
        with pytest.raises(UserError, match="holds 10 of the 20 numbers of ema/w from 150 on"):
            read.read("ema", "w", 150, torch.empty(20))


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In order: files and directories that were flushed, and renames, as `old -> new`, by their names."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(old: Any, new: Any) -> None:
        done.append(f"{Path(old).name} -> {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    return done


def test_a_directory_is_on_the_disk_before_it_has_its_name(tmp_path, synced):
    with files.new_directory(tmp_path / "export") as aside:
        (aside / "weights").write_text("1")
        (aside / "tokenizer").mkdir()
        (aside / "tokenizer" / "vocabulary").write_text("1")
    rename = synced.index(".export.partial -> export")
    before, after = synced[:rename], synced[rename + 1 :]
    assert {"weights", "tokenizer", "vocabulary", ".export.partial"} <= set(before)
    assert before.index("vocabulary") < before.index("tokenizer") < before.index(".export.partial", 1)
    assert after == [tmp_path.name]


def test_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path, synced):
    """Its own name in the directory above it, too: the older ones are removed next."""
    saver = Saver(tmp_path / "checkpoints", ALONE, 1, async_save=False)
    save(saver, 10)
    commit = next(i for i, event in enumerate(synced) if event.endswith("-> manifest.json"))
    assert {SHARD, "index.json", "checkpoints", tmp_path.name} <= {name.split(" -> ")[-1] for name in synced[:commit]}
    assert synced[commit + 1] == "step-00000010"


def test_a_new_export_never_leaves_none(tmp_path, monkeypatch):
    """Killed between taking the old one away and putting the new one there, the next start has the old one back."""
    place = tmp_path / "export"
    with files.new_directory(place) as aside:
        (aside / "a").write_text("old")

    class Killed(BaseException):
        pass

    replace = os.replace

    def killed_after_one(old: Any, new: Any) -> None:
        if Path(new) == place:
            raise Killed
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed_after_one)
    with pytest.raises(Killed), files.new_directory(place, replace=True) as aside:
        (aside / "a").write_text("new")
    monkeypatch.undo()
    assert not place.exists()  # so it is with a kill; an error would have put it back already
    with pytest.raises(UserError, match="already exists"), files.new_directory(place):
        pass
    assert (place / "a").read_text() == "old" and names(tmp_path) == ["export"]
    with files.new_directory(place, replace=True) as aside:
        (aside / "a").write_text("new")
    assert (place / "a").read_text() == "new" and names(tmp_path) == ["export"]
