"""Locks that a killed process left among torch's compiled operators, on which the next start would wait for ever."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def drop_stale_locks() -> list[Path]:
    """Remove locks that no process holds open, as a builder does from beginning to end; returns them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions").resolve()
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not locks:
        return []
    held = _open_files()
    stale = [lock for lock in locks if str(lock) not in held]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _open_files() -> set[str]:
    """Paths that this user's processes hold open."""
    found = set()
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it is closed by now, or another user's
            found.add(os.readlink(handle))
    return found
