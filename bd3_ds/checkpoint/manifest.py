"""Checkpoint manifests: which checkpoints of a directory are complete, by names, manifests and file sizes; no torch.

    checkpoints/step-00000100/   rank-*.safetensors · index.json · manifest.json

The manifest is written last: a directory without one, or with a file of another size, is no checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json
from bd3_ds.runtime.step_names import step_of

MANIFEST = "manifest.json"
INDEX = "index.json"
SUFFIX = ".safetensors"
FORMAT = 2
# Hidden files are those of writers that were killed, and what a network file system keeps for open files.
_OURS = re.compile(rf"{re.escape(MANIFEST)}|{re.escape(INDEX)}|rank-\d+{re.escape(SUFFIX)}|\..*")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """The training state that was saved with it."""
        return dict(self.manifest["state"])


def checkpoint_directories(directory: Path) -> list[Path]:
    """What has the name of a checkpoint, complete or not, oldest first; never a user's step-00000100-backup."""
    try:
        found = [(step_of(path.name), path) for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def is_ours(path: Path) -> bool:
    """Whether a directory holds only what saves write, so that it may be removed; links are a user's."""
    try:
        return not path.is_symlink() and all(_OURS.fullmatch(entry.name) for entry in path.iterdir())
    except OSError:  # no directory, or one that has just gone
        return False


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """Committed checkpoints, oldest first, by manifest and file sizes; content is checked by `newest_checkpoint`."""
    found = [complete_checkpoint(path) for path in checkpoint_directories(directory)]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def complete_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` where it is committed and every file has the size that was committed."""
    manifest = _manifest(path)
    if manifest is None or any(_size(path / name) != entry["bytes"] for name, entry in manifest["files"].items()):
        return None
    return Checkpoint(path, manifest)


def committed(directory: Path) -> Checkpoint | None:
    """The newest checkpoint with a manifest; whether its files are whole is not looked at."""
    for path in reversed(checkpoint_directories(directory)):
        manifest = _manifest(path)
        if manifest is not None:
            return Checkpoint(path, manifest)
    return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _manifest(path: Path) -> dict[str, Any] | None:
    """What was committed at `path`; None if nothing was, or if the manifest can no longer be read."""
    try:
        manifest = read_json(path / MANIFEST, "checkpoint manifest")
    except (UserError, OSError):
        return None
    if not isinstance(manifest, dict) or "format" not in manifest:
        return None
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {manifest['format']}; this version reads format {FORMAT}")
    return manifest
