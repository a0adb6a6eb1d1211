"""Locks that a killed process left among torch's compiled operators, on which the next start would wait for ever."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

LONGEST_BUILD = 3600.0  # seconds


def drop_stale_locks() -> list[Path]:
    """Remove locks that no process holds open, as a builder does from beginning to end; returns them.

    Where other hosts may share the directory, their processes are not seen: there a lock must be old as well.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions").resolve()
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not locks:
        return []
    held = _open_files()
    stale = [lock for lock in locks if str(lock) not in held and (_is_ours_alone(lock) or _is_old(lock))]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _is_ours_alone(path: Path) -> bool:
    """Whether a file lies on a disk of this host; network file systems, and some others, have no major number."""
    return os.major(path.stat().st_dev) != 0


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > LONGEST_BUILD


def _open_files() -> set[str]:
    """Paths that this user's processes hold open."""
    found = set()
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it is closed by now, or another user's
            found.add(os.readlink(handle))
    return found
