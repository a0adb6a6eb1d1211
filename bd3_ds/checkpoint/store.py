"""Checkpoints that count only when complete: shards first, a manifest last, the newest complete one is loaded.

    checkpoints/step-00000100/   shards of every rank · manifest.json (state, and each file's size and hash)

DeepSpeed's own `latest` file is neither written nor read: it can name a checkpoint that was never finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json, require_writable, write_json
from bd3_ds.runtime.world import World

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """The training state that was saved with it."""
        return dict(self.manifest["state"])


def save_checkpoint(
    directory: Path, tag: str, state: dict[str, Any], write_shards: Callable[[Path, str], None], world: World, keep: int
) -> None:
    """Have every rank write its shards, then commit them with a manifest; keep the `keep` newest complete ones."""
    target = directory / tag
    if world.is_main:
        require_writable(directory)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    world.barrier()
    write_shards(directory, tag)
    world.barrier()
    files = _hashed(target, world)
    if world.is_main:
        manifest = {"format": FORMAT, "tag": tag, "world_size": world.size, "state": state, "files": files}
        write_json(target / MANIFEST, manifest)
        _keep_newest(directory, tag, keep)
    world.barrier()


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """Committed checkpoints, oldest first, by manifest and file sizes; content is checked by `newest_checkpoint`."""
    found = []
    for path in sorted(directory.glob("step-*")):
        manifest = _manifest(path)
        if manifest is not None:
            sizes = {name: (path / name).stat().st_size for name in manifest["files"] if (path / name).is_file()}
            if sizes == {name: entry["bytes"] for name, entry in manifest["files"].items()}:
                found.append(Checkpoint(path, manifest))
    return found


def newest_checkpoint(directory: Path, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every file has the committed size and hash; passes over others and says so.

    All ranks come to the same answer: each hashes its share of the files and they agree.
    """
    complete = complete_checkpoints(directory)
    known = {checkpoint.path for checkpoint in complete}
    for path in sorted(directory.glob("step-*")):
        if path not in known:
            say(f"checkpoint {path.name} is incomplete and is passed over")
    for checkpoint in reversed(complete):
        expected = {name: entry["xxh64"] for name, entry in checkpoint.manifest["files"].items()}
        actual = {name: entry["xxh64"] for name, entry in _hashed(checkpoint.path, world, list(expected)).items()}
        if actual == expected:
            return checkpoint
        broken = next(name for name in expected if actual[name] != expected[name])
        say(f"checkpoint {checkpoint.path.name} is damaged ({broken}) and is passed over")
    return None


def _keep_newest(directory: Path, tag: str, keep: int) -> None:
    """Of the checkpoints up to `tag` keep the newest complete ones, and no others.

    Later ones belong to a past that this run did not continue, because they were torn or damaged; counting them as the
    newest would throw away the good ones.
    """
    kept = [checkpoint.path for checkpoint in complete_checkpoints(directory) if checkpoint.path.name <= tag][-keep:]
    for path in directory.glob("step-*"):
        if path not in kept:
            (path / MANIFEST).unlink(missing_ok=True)  # first, so that a half-deleted checkpoint does not count
            shutil.rmtree(path)


def _manifest(path: Path) -> dict[str, Any] | None:
    """What was committed at `path`; None if nothing was, or if the manifest can no longer be read."""
    try:
        manifest = read_json(path / MANIFEST, "checkpoint manifest")
    except UserError:
        return None
    if not isinstance(manifest, dict) or "format" not in manifest:
        return None
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {manifest['format']}; this version reads format {FORMAT}")
    return manifest


def _hashed(directory: Path, world: World, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of a checkpoint, the work shared among ranks."""
    if names is None:
        names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    names = sorted(name for name in names if name != MANIFEST)
    mine = {name: _entry(directory / name) for name in names[world.rank :: world.size]}
    shares: list[Any] = [mine]
    if world.size > 1:
        shares = [None] * world.size
        torch.distributed.all_gather_object(shares, mine)
    merged = {name: entry for share in shares for name, entry in share.items()}
    return {name: merged[name] for name in names}


def _entry(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "xxh64": digest.hexdigest()}
