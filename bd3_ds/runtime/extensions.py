"""DeepSpeed's operators, compiled at first use: announcements, and stale build locks of killed compilers.

On such a lock the next start would wait for ever.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

LONGEST_BUILD = 3600.0  # seconds
_GRACE = 1.0  # seconds between two looks: a builder closes its lock a moment before it removes it


def drop_stale_locks() -> list[Path]:
    """Remove locks that no process holds open, as a builder does from beginning to end; returns them.

    A lock must be the same file, held by nobody, at two looks. Where other hosts may share the directory, or the lock
    is another user's, the processes are not all seen: there a lock must be old as well.
    """
    root = extensions_folder()
    before = _unheld(root)
    if not before:
        return []
    time.sleep(_GRACE)
    after = _unheld(root)
    dropped = []
    for lock, file in before.items():
        # Looked at again right before: another start may have dropped it, and a builder made its own since.
        if after.get(lock) == file == _identity(lock):
            lock.unlink(missing_ok=True)
            dropped.append(lock)
    return dropped


def build_announcement(operator: str, packages: Path) -> str | None:
    """What to say before DeepSpeed loads one of its operators: that it is compiled now; None where it lies there.

    packages: where the torch is installed against which it must have been compiled, else it is compiled anew.
    """
    for place in (extensions_folder() / operator, *extensions_folder().glob(f"*/{operator}")):
        script = place / "build.ninja"
        if (place / f"{operator}.so").is_file() and script.is_file() and str(packages) in script.read_text():
            return None
        if (place / "lock").exists():
            return f"waiting for another process that compiles DeepSpeed's operator {operator}, about a minute"
    return f"compiling DeepSpeed's operator {operator}, once, about a minute"


def extensions_folder() -> Path:
    """Where torch keeps what it compiles."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions").resolve()


def _unheld(root: Path) -> dict[Path, tuple[int, ...]]:
    """The locks that no process holds open, each with the file that it is."""
    locks = {lock: _identity(lock) for lock in (*root.glob("*/lock"), *root.glob("*/*/lock"))}
    if not locks:
        return {}
    held = _open_locks()
    return {lock: file for lock, file in locks.items() if file and file[:2] not in held and _may_be_judged(lock)}


def _identity(path: Path) -> tuple[int, ...]:
    """Device, inode and time of birth of a file, as near as there is; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _may_be_judged(lock: Path) -> bool:
    """Whether every process that could hold the lock is seen here, or it is too old to be held."""
    try:
        return (_is_ours_alone(lock) and lock.stat().st_uid == os.getuid()) or _is_old(lock)
    except FileNotFoundError:  # its builder has finished
        return False


def _is_ours_alone(path: Path) -> bool:
    """Whether a file lies on a disk of this host; network file systems, and some others, have no major number."""
    return os.major(path.stat().st_dev) != 0


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > LONGEST_BUILD


def _open_locks() -> set[tuple[int, int]]:
    """Device and inode of the files called `lock` that this user's processes hold open, by whatever path."""
    found = set()
    for process in os.listdir("/proc"):
        if not process.isdigit():
            continue
        with suppress(OSError):  # it has ended by now, or is another user's
            for number in os.listdir(f"/proc/{process}/fd"):
                handle = f"/proc/{process}/fd/{number}"
                with suppress(OSError):  # it is closed by now
                    if os.readlink(handle).endswith("/lock"):
                        status = os.stat(handle)
                        found.add((status.st_dev, status.st_ino))
    return found
