"""The run lock: one start of a run at a time, held by the main rank while it lives.

    RUN_DIR/run.lock   its holder: host, process, since when; the kernel releases the lock when that dies
    RUN_DIR/run.held   the same where the file system has no locks; the holder removes it

The lock is fcntl's: it spans machines where the file system's locks do, and children of the holder do not keep it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import make_directory, sync
from bd3_ds.runtime.world import World

LOCK, HELD = "run.lock", "run.held"
PATIENCE = 5.0  # seconds that the last holder may take to die
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def run_lock(run_dir: Path, world: World, patience: float = PATIENCE) -> Iterator[None]:
    """Hold `run_dir` against other starts of the same run; nothing in it is touched where another holds it.

    Raises UserError on all ranks, naming the holder, once it has been held for `patience` seconds.
    """
    held: list[_Lock] = []
    world.on_main(lambda: held.append(_take(run_dir, patience)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


class _Lock:
    """A lock that this process holds: an open file with the kernel's lock on it, or a file that is removed."""

    def __init__(self, handle: int | None = None, file: Path | None = None):
        self._handle, self._file = handle, file

    def release(self) -> None:
        """Release the lock."""
        if self._handle is not None:
            with suppress(OSError):  # who reads it later need not think that it is held
                os.ftruncate(self._handle, 0)
            os.close(self._handle)
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()


def _take(run_dir: Path, patience: float) -> _Lock:
    make_directory(run_dir)
    deadline = time.monotonic() + patience
    while True:
        try:
            lock, holder = _by_kernel(run_dir / LOCK), ""
        except OSError as error:
            if error.errno in _TAKEN:
                lock, holder = None, _in_words(run_dir / LOCK)
            elif error.errno in _NO_LOCKS:
                lock, holder = _by_file(run_dir / HELD)
            else:
                raise UserError(f"run_dir={run_dir} cannot be locked: {error.strerror or error}") from None
        if lock is not None:
            return lock
        if time.monotonic() >= deadline:
            raise UserError(
                f"run_dir={run_dir} is in use: {holder}; nothing was changed. Wait for it or stop it, or give this "
                "run a run_dir of its own"
            )
        time.sleep(0.1)


def _by_kernel(path: Path) -> _Lock:
    """Raises OSError where another process holds it, or the file system has no locks."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask: a group may share its runs
    except PermissionError as error:  # lockf's error for a lock that is held
        raise OSError(errno.EPERM, error.strerror) from None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_ourselves()).encode())
        os.fsync(handle)
    except BaseException:
        os.close(handle)
        raise
    return _Lock(handle=handle)


def _by_file(path: Path) -> tuple[_Lock | None, str]:
    """The lock, or who holds it. One whose process is known to be dead is taken over; of other machines none is."""
    with suppress(FileNotFoundError):
        text = path.read_text(encoding="utf-8")
        if not _is_dead(_holder(text)):
            return None, f"{_in_words(path)} (by {path}: where that process runs no more, remove this file)"
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        os.rename(path, aside)  # of several that saw the dead one, one succeeds
        if aside.read_text(encoding="utf-8") != text:  # a living one had taken its place since
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None, _in_words(path)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(_ourselves(), file)
    sync(path)
    return _Lock(file=path), ""


def _ourselves() -> dict[str, Any]:
    """Containers may share a host name, not a process-number space; numbers may be used again."""
    space = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "pid_space": os.readlink(space) if space.exists() else "",
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _holder(text: str) -> dict[str, Any]:
    """Empty until the holder has written its entry."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _in_words(path: Path) -> str:
    try:
        holder = _holder(path.read_text(encoding="utf-8"))
    except OSError:
        holder = {}
    if not {"pid", "host", "since"} <= holder.keys():
        return "another process trains it"
    return f"process {holder['pid']} on {holder['host']} trains it since {holder['since']}"


def _is_dead(holder: dict[str, Any]) -> bool:
    us = _ourselves()
    if any(holder.get(key) != us[key] for key in ("host", "pid_space")):
        return False
    try:
        process = psutil.Process(int(holder["pid"]))
        same = abs(process.create_time() - float(holder["started"])) < 2.0
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (KeyError, ValueError, psutil.Error):
        return False
