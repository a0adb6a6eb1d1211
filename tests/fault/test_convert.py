"""Conversions on a disk that fills up at any file: one sentence, and what was there before stays."""

import shutil
import subprocess

import pytest

from bd3_ds.commands import convert as convert_command
from bd3_ds.runtime.errors import run_command
from tests.unit.interop.test_hub_export import content, exports  # noqa: F401 (a fixture)


@pytest.fixture
def disk(tmp_path):
    """Directory of a small file system; `disk.fill(free)` leaves so many bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk, free):
    """Leave `free` bytes, a multiple of pages, on the disk."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    ballast.write_bytes(b"x" * (shutil.disk_usage(disk).free - free))


@pytest.mark.parametrize("target", ["hf", "upstream"])
def test_full_disk_is_one_sentence_at_every_file(disk, exports, capsys, target):  # noqa: F811
    words = ["--from", "export", "--to", target, str(exports["bd3"]), str(disk / "out")]
    assert run_command(convert_command.main, words) == 0
    whole = content(disk / "out")
    size = sum(-(-len(data) // 4096) * 4096 for data in whole.values())
    fills = sorted({*range(0, size, max(4096, size // 12 // 4096 * 4096)), size - 4096})
    for free in fills:
        fill(disk, free)
        assert run_command(convert_command.main, [*words, "--overwrite"]) == 2, free
        told = capsys.readouterr().err
        assert told.startswith("error: no room is left on the disk of") and told.count("\n") == 1, (free, told)
        assert content(disk / "out") == whole
        assert {path.name for path in disk.iterdir()} == {"out", "ballast"}
    (disk / "ballast").unlink()
    assert run_command(convert_command.main, [*words, "--overwrite"]) == 0
