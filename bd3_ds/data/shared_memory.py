"""Stale shared memory: what a killed run left on its host, told from what a running one holds.

streaming keeps its state in /dev/shm under NNNNNN_name and its locks in the temporary directory under the same number.
After a kill -9 both stay: the next run then takes the directory of a remote pack for used by another, and its numbers
grow without end. A number is in use as long as any process maps its segments, or holds the lock of `hold`, which
processes in another container on the same host can see.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from bd3_ds.runtime.errors import UserError

SHM = Path("/dev/shm")
PATIENCE = 30.0  # seconds that the last processes of a killed run are given to end
_FILE = re.compile(
    r"(\d{6})_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data"
    r"|barrier_filelock|cache_filelock)"
)
_MAPPED = re.compile(rb"/dev/shm/(\d{6})_")


def clear_stale(caches: list[str]) -> None:
    """Remove what no process uses, and wait until none uses `caches`, directories of remote packs.

    Raises UserError for one that another run goes on using.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        used = _remove_unused()
        taken = [directory for directory in caches if directory in used]
        if not taken:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{taken[0]} is in use by another run on this host; wait for its end, or give this run a data.cache of "
                "its own"
            )
        time.sleep(0.2)


def hold(number: int) -> IO[bytes]:
    """Mark the segments of a dataset as in use for as long as the returned file, or a fork's copy of it, is open."""
    file = (SHM / f"{number:06}_locals").open("rb")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _remove_unused() -> set[str]:
    """Returns the directories that live runs have registered."""
    # First the files, then who uses them: what another run makes meanwhile is not among the files.
    files = [
        (path, found[1], _inode(path))
        for folder in (SHM, Path(tempfile.gettempdir()))
        for path in folder.iterdir()
        if (found := _FILE.fullmatch(path.name))
    ]
    live = set(_mapped_numbers())
    used: set[str] = set()
    for number in {number for _, number, _ in files}:
        registry = SHM / f"{number}_locals"
        if number in live or _is_held(registry):
            live.add(number)
            used.update(_registered(registry))
    for path, number, inode in files:
        with suppress(FileNotFoundError):
            if number not in live and path.stat().st_uid == os.getuid() and _inode(path) == inode:
                path.unlink()
    return used


def _inode(path: Path) -> int:
    """Which file it is; 0 where there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _mapped_numbers() -> Iterator[str]:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or belongs to another user, whose files are not ours to remove
            yield from (number.decode() for number in _MAPPED.findall(maps.read_bytes()))


def _is_held(registry: Path) -> bool:
    try:
        with open(registry, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _registered(registry: Path) -> list[str]:
    """The directories in a segment of streaming's: the size of all as int32, then names and the number, \\0 between."""
    try:
        content = registry.read_bytes()
    except OSError:
        return []
    size = struct.unpack_from("<i", content)[0] if len(content) >= 4 else 0
    return content[4:size].decode("utf-8", "replace").split("\0")[:-1]
