"""What is on disk: whole or absent, readable by whom the umask lets read, and not hidden by a resumed run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from bd3_ds.runtime import records
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import new_directory, require_writable, write_json, write_text
from bd3_ds.runtime.log import RunLog
from bd3_ds.runtime.run_dir import TRAIN_RECORDS
from tests.helpers.tiny import tiny_export, tiny_run


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_shared_disks(umask: int, tmp_path: Path) -> None:
    """Packs, exports and records are for the group too, where the umask says so; nothing is the owner's alone."""
    run = tiny_run(tmp_path)
    tiny_export(run)
    records.append(tmp_path / "run" / TRAIN_RECORDS, {"step": 1})
    write_json(tmp_path / "run" / "some.json", {})
    made = [path for part in ("train", "run") for path in (tmp_path / part).rglob("*")]
    assert len(made) > 12
    for path in made:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == expected, path


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "new \udc80")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    with new_directory(tmp_path / "pack") as directory:
        write_text(directory / "a", "1")
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "pack", replace=True) as directory:
        write_text(directory / "b", str(1 // 0))
    with pytest.raises(UserError, match="already exists"), new_directory(tmp_path / "pack"):
        pass
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["pack", "pack/a"]


def test_looking_whether_one_may_write_writes_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "not" / "yet" / "there")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/below", "link"):
        with pytest.raises(UserError, match=f"cannot write to {tmp_path / place}: "):
            require_writable(tmp_path / place)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_resumed_run_hides_no_points(tmp_path: Path) -> None:
    """Training set back to step 2 keeps its first lines, and the evaluation worker's later points stay visible."""
    train(tmp_path, 0, 6)
    worker = SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=".eval")
    worker.add_scalar("eval/valid/ppl", 9.0, 6)
    worker.close()
    train(tmp_path, 2, 4)
    assert [line["step"] for line in records.read(tmp_path / TRAIN_RECORDS)] == [1, 2, 3, 4]
    points = EventAccumulator(str(tmp_path / "tensorboard"))
    points.Reload()
    assert [point.step for point in points.Scalars("eval/valid/ppl")] == [6]
    assert {point.step for point in points.Scalars("train/loss")} == {1, 2, 3, 4, 5, 6}


def train(run_dir: Path, first: int, last: int) -> None:
    log = RunLog(run_dir, True, first)
    for step in range(first + 1, last + 1):
        log.record({"step": step, "loss": 1.0})
        log.scalars({"train/loss": 1.0}, step)
    log.close()
