"""Leases: claims on exports among workers that share only a file system.

A claim on NAME is a file NAME.1, the next claim NAME.2, and so on; the highest number rules. Claiming is creating the
next number exclusively, which exactly one process can do, and numbers are never deleted, so that a slow process cannot
mistake an old state for the present one. The next number may be taken when the ruling one says that it was released,
when its process is known to be dead, or when its heartbeat (the file's modification time) is old.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from bd3_ds.runtime.files import write_json

STALE_AFTER = 120.0  # seconds without a heartbeat after which a worker on another machine counts as dead


class Lease:
    """A claim that this process holds until `release`; a thread keeps its heartbeat."""

    def __init__(self, path: Path, stale_after: float):
        self.path = path
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(stale_after / 4,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def held(self) -> bool:
        """False once another process has taken over, because this one seemed dead."""
        name, number = self.path.name.rsplit(".", 1)
        return not self._done.is_set() and _ruling(self.path.parent, name) == int(number)

    def release(self) -> None:
        """Let others claim; more than once is harmless."""
        if not self._done.is_set():
            self._done.set()
            self._thread.join()
            write_json(self.path, {**_ourselves(), "released": True})

    def _beat(self, seconds: float) -> None:
        while not self._done.wait(seconds):
            with contextlib.suppress(OSError):  # a file server that is away for a moment must not end the work
                os.utime(self.path)


def claim(directory: Path, name: str, stale_after: float = STALE_AFTER) -> Lease | None:
    """The lease on `name` in `directory`, or None where another process holds it or was faster."""
    directory.mkdir(parents=True, exist_ok=True)
    number = _ruling(directory, name)
    if number and not _free(directory / f"{name}.{number}", stale_after):
        return None
    path = directory / f"{name}.{number + 1}"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(_ourselves(), file)
    return Lease(path, stale_after)


def _ruling(directory: Path, name: str) -> int:
    """The highest number of `name`, 0 where there is none."""
    numbers = (path.name.removeprefix(f"{name}.") for path in directory.glob(f"{glob.escape(name)}.*"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _free(path: Path, stale_after: float) -> bool:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        holder = {}  # between its creation and its first line; the heartbeat decides
    if holder.get("released"):
        return True
    us = _ourselves()
    if all(holder.get(key) == us[key] for key in ("host", "pid_space")) and not _alive(holder):
        return True
    return _file_system_time(path.parent) - path.stat().st_mtime > stale_after


def _ourselves() -> dict[str, Any]:
    """Who holds a lease. Containers may share a host name, not a process-number space; numbers may be used again."""
    space = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "pid_space": os.readlink(space) if space.exists() else "",
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "time": time.time(),
    }


def _alive(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(holder["pid"]))
        same = abs(process.create_time() - float(holder["started"])) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _file_system_time(directory: Path) -> float:
    """Now by the clock that also stamps the heartbeats, which may be a file server's."""
    with tempfile.TemporaryFile(dir=directory) as probe:
        probe.write(b".")
        probe.flush()
        return os.fstat(probe.fileno()).st_mtime
