"""What is removed once something newer is on disk. A removal that fails ends nothing: it is tried again later.

Network file systems refuse to remove what another machine has open (EBUSY, ENOTEMPTY). What is half removed is in no
list: a checkpoint loses its manifest first, an export its name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from bd3_ds.checkpoint.manifest import MANIFEST, checkpoint_directories, complete_checkpoints, is_ours
from bd3_ds.runtime.files import sync
from bd3_ds.runtime.step_names import step_of


def prune_checkpoints(directory: Path, tag: str, keep: int, keep_every: int | None) -> dict[Path, OSError]:
    """Of the complete checkpoints up to `tag` keep the newest, and those of every `keep_every` steps; no others.

    Later ones belong to a past that this run did not continue, because they were torn or damaged; counting them as the
    newest would throw away the good ones. Directories with other names or with a user's files in them stay. Returns what could not be removed.
    """
    last = step_of(tag)
    assert last is not None
    past = [found for found in complete_checkpoints(directory) if (step_of(found.path.name) or 0) <= last]
    kept = [found.path for found in past[-keep:]]
    if keep_every is not None:
        kept += [found.path for found in past if found.state["step"] % keep_every == 0]
    failed = {}
    for path in checkpoint_directories(directory):
        if path not in kept and path.name != tag and is_ours(path):
            try:
                remove_checkpoint(path)
            except OSError as error:
                failed[path] = error
    return failed


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its manifest first; of the rest as much as goes. Raises the first OSError.

    Where the manifest stays, all else does: the checkpoint is then as complete as it was.
    """
    (path / MANIFEST).unlink(missing_ok=True)
    sync(path)  # a power cut must not bring the manifest back without its files
    remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a directory; where a file of it cannot be removed the others are. Raises the first OSError."""
    failed: OSError | None = None
    for entry in path.iterdir():
        try:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    path.rmdir()
