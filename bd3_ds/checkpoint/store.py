"""Checkpoints that count only when complete: shards first, a manifest last, the newest complete one is loaded.

    checkpoints/step-00000100/   rank-*.safetensors (`shards.py`) · manifest.json (state, and each file's size and hash)

The shards are written behind the run's back (`Saver`), from copies; a manifest commits them once all are on disk.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from bd3_ds.checkpoint.shards import shard_file, write_shard
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json, require_writable, write_json
from bd3_ds.runtime.world import World

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """The training state that was saved with it."""
        return dict(self.manifest["state"])


class Saver:
    """Writes checkpoints, one at a time: `start`, then `finish` once no rank is `busy`, or at once.

    All ranks call `start` and `finish` together. `keep` newest checkpoints stay, and those whose step is a multiple of
    `keep_every`. `behind`: the shards are written by a thread while training goes on.
    """

    def __init__(self, directory: Path, world: World, keep: int, behind: bool, keep_every: int | None = None):
        self.directory = directory
        self._world = world
        self._keep = keep
        self._keep_every = keep_every
        self._behind = behind
        self._tag: str | None = None
        self._state: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._written: dict[str, Any] | str = ""  # this rank's file and its entry in the manifest, or what is wrong

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is started and not finished."""
        return self._tag is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's shard is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, tag: str, state: dict[str, Any], pieces: Iterable[tuple[str, Tensor]]) -> None:
        """Begin to save the tensors of this rank as they are now, once the last checkpoint is finished."""
        self.finish()
        target = self.directory / tag
        if self._world.is_main:
            require_writable(self.directory)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        self._world.barrier()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in pieces}
        self._tag, self._state, self._written = tag, state, "its shard was not written"
        self._thread = threading.Thread(target=self._write, args=(target, copies), name=f"save-{tag}")
        self._thread.start()
        if not self._behind:
            self.finish()

    def _write(self, target: Path, copies: dict[str, Tensor]) -> None:
        try:
            path = target / shard_file(self._world.rank)
            write_shard(path, copies)
            self._written = {path.name: _entry(path)}
        except OSError as error:
            self._written = error.strerror or str(error)

    def finish(self) -> None:
        """Wait for every rank's shard and commit the checkpoint; keep the newest complete ones.

        Raises UserError where a rank could not write; what was complete before is left as it was.
        """
        if self._tag is None or self._thread is None:
            return
        self._thread.join()
        tag, target = self._tag, self.directory / self._tag
        self._tag = self._thread = None
        written = gather(self._written, self._world)
        failed = next(((rank, reason) for rank, reason in enumerate(written) if isinstance(reason, str)), None)
        if self._world.is_main and failed is None:
            files = {name: entry for each in written for name, entry in each.items()}
            manifest = {
                "format": FORMAT,
                "tag": tag,
                "world_size": self._world.size,
                "state": self._state,
                "files": dict(sorted(files.items())),
            }
            try:
                write_json(target / MANIFEST, manifest)
                _prune(self.directory, tag, self._keep, self._keep_every)
            except OSError as error:
                failed = (0, error.strerror or str(error))
        failed = gather(failed, self._world)[0]
        if failed is not None:
            if self._world.is_main:
                shutil.rmtree(target, ignore_errors=True)
            left = [checkpoint.path.name for checkpoint in complete_checkpoints(self.directory)]
            raise UserError(
                f"cannot save {target}: {failed[1]} (rank {failed[0]}); the newest checkpoint is "
                f"{left[-1] if left else 'none'}; mend that, and the same command continues from there"
            )


def gather(value: Any, world: World) -> list[Any]:
    """`value` of every rank, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


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


def _prune(directory: Path, tag: str, keep: int, keep_every: int | None) -> None:
    """Of the complete checkpoints up to `tag` keep the newest, and those of every `keep_every` steps; no others.

    Later ones belong to a past that this run did not continue, because they were torn or damaged; counting them as the
    newest would throw away the good ones.
    """
    past = [checkpoint for checkpoint in complete_checkpoints(directory) if checkpoint.path.name <= tag]
    kept = [checkpoint.path for checkpoint in past[-keep:]]
    if keep_every is not None:
        kept += [checkpoint.path for checkpoint in past if checkpoint.state["step"] % keep_every == 0]
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


def _hashed(directory: Path, world: World, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of a checkpoint, the work shared among ranks."""
    mine = {name: _entry(directory / name) for name in names[world.rank :: world.size]}
    merged = {name: entry for share in gather(mine, world) for name, entry in share.items()}
    return {name: merged[name] for name in names}


def _entry(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "xxh64": digest.hexdigest()}
