"""Committed checkpoints: every rank writes its shard, then a manifest commits them; the newest complete one is loaded.

    checkpoints/step-00000100/   rank-*.safetensors and index.json (`shards.py`) · manifest.json (`manifest.py`)

The shards are written asynchronously (`Saver`), from copies; a manifest commits them once all are on disk. Only the
main rank lists directories and broadcasts what is there: listings of a network file system may differ.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from bd3_ds.checkpoint.manifest import (
    FORMAT,
    INDEX,
    MANIFEST,
    Checkpoint,
    checkpoint_directories,
    complete_checkpoints,
    is_ours,
)
from bd3_ds.checkpoint.retention import prune_checkpoints, remove_checkpoint
from bd3_ds.checkpoint.shards import layout, shard_file, write_index, write_shard
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import make_directory, require_writable, wait_for_file, write_json
from bd3_ds.runtime.world import World


class Saver:
    """Writes checkpoints, one at a time: `start`, then `finish` once no rank is `busy`, or at once.

    All ranks call `start` and `finish` together. `keep` newest checkpoints stay, and those whose step is a multiple of
    `keep_every`. `async_save`: a thread writes the shards while training goes on. `say`: called on the main rank
    with a line about old checkpoints that cannot be removed; absent: stderr.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        keep: int,
        async_save: bool,
        keep_every: int | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.directory = directory
        self._world = world
        self._keep = keep
        self._keep_every = keep_every
        self._async_save = async_save
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._reported: set[Path] = set()
        self._tag: str | None = None
        self._state: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._written: dict[str, Any] | str = ""  # this rank's file and what is in it, or what is wrong

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is started and not finished."""
        return self._tag is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's shard is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, tag: str, state: dict[str, Any], pieces: Iterable[tuple[str, Tensor]]) -> None:
        """Begin to save the tensors of this rank as they are now, once the last checkpoint is finished.

        Raises UserError on all ranks where the main rank cannot make the directory.
        """
        self.finish()
        target = self.directory / tag
        self._world.on_main(lambda: _empty_directory(target))
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in pieces}
        self._tag, self._state, self._written = tag, state, "its shard was not written"
        self._thread = threading.Thread(target=self._write, args=(target, copies), name=f"save-{tag}")
        self._thread.start()
        if not self._async_save:
            self.finish()

    def _write(self, target: Path, copies: dict[str, Tensor]) -> None:
        try:
            target.mkdir(parents=True, exist_ok=True)  # rank 0 made it, which a file server may not show here yet
            path = target / shard_file(self._world.rank)
            write_shard(path, copies)
            self._written = {path.name: {**_entry(path), "pieces": layout(copies)}}
        except OSError as error:
            self._written = error.strerror or str(error)

    def finish(self) -> None:
        """Wait for every rank's shard and commit the checkpoint; keep the newest complete ones.

        Raises UserError on all ranks where one could not write; what was complete before is left as it was. An old
        checkpoint that cannot be removed is reported, and removed at a later save if it can be.
        """
        if self._tag is None or self._thread is None:
            return
        self._thread.join()
        tag, target = self._tag, self.directory / self._tag
        self._tag = self._thread = None
        written = self._world.all_gather_object(self._written)
        self._world.on_main(lambda: self._commit(target, written))
        if self._world.is_main:
            self._prune(tag)

    def _commit(self, target: Path, written: list[dict[str, Any] | str]) -> None:
        """Write index and manifest; raises UserError, and leaves nothing, where a rank or this fails."""
        failed = next(((rank, reason) for rank, reason in enumerate(written) if isinstance(reason, str)), None)
        if failed is None:
            entries = {name: dict(entry) for each in written if isinstance(each, dict) for name, entry in each.items()}
            try:
                write_index(target / INDEX, {name: entry.pop("pieces") for name, entry in entries.items()})
                entries[INDEX] = _entry(target / INDEX)
                manifest = {
                    "format": FORMAT,
                    "tag": target.name,
                    "world_size": self._world.size,
                    "state": self._state,
                    "files": dict(sorted(entries.items())),
                }
                write_json(target / MANIFEST, manifest)
                return
            except OSError as error:
                failed = (0, error.strerror or str(error))
        with suppress(OSError):
            remove_checkpoint(target)
        left = complete_checkpoints(self.directory)
        raise UserError(
            f"cannot save {target}: {failed[1]} (rank {failed[0]}); the newest checkpoint is "
            f"{left[-1].path.name if left else 'none'}; mend that, and the same command continues from there"
        )

    def _prune(self, tag: str) -> None:
        """Remove old checkpoints; the new one is committed, so that nothing here may end the run."""
        try:
            failed = prune_checkpoints(self.directory, tag, self._keep, self._keep_every)
        except (OSError, UserError) as error:
            self._say(f"old checkpoints in {self.directory} cannot be listed and stay: {error}")
            return
        for path, reason in failed.items():
            if path not in self._reported:
                self._reported.add(path)
                self._say(
                    f"cannot remove the old checkpoint {path}: {reason.strerror or reason}; the run goes on, and each "
                    "later save tries again"
                )


def newest_checkpoint(directory: Path, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every file has the committed size and hash; skips others and says so.

    All ranks come to the same answer: the main rank lists, each hashes its share of the files, and they agree.
    """
    complete, incomplete = world.on_main(lambda: _listed(directory))
    for name in incomplete:
        say(f"checkpoint {name} is incomplete and is passed over")
    for name, manifest in reversed(complete):
        path = directory / name
        expected = {name: entry["xxh64"] for name, entry in manifest["files"].items()}
        actual = _hashed(path, world, list(expected))
        if actual == expected:
            return Checkpoint(path, manifest)
        broken = next(name for name in expected if actual[name] != expected[name])
        say(f"checkpoint {path.name} is damaged ({broken}) and is passed over")
    return None


def _listed(directory: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Complete checkpoints with their manifests, and the names of incomplete ones; oldest first."""
    complete = [(found.path.name, found.manifest) for found in complete_checkpoints(directory)]
    known = {name for name, _ in complete}
    return complete, [path.name for path in checkpoint_directories(directory) if path.name not in known]


def _empty_directory(target: Path) -> None:
    """An empty directory for a checkpoint; raises UserError."""
    require_writable(target.parent)
    try:
        (target / MANIFEST).unlink(missing_ok=True)
        if is_ours(target):
            with suppress(OSError):  # what stays is in no manifest
                remove_checkpoint(target)
        make_directory(target)
    except OSError as error:
        raise UserError(f"cannot save {target}: {error.strerror or error}; mend that, and start again") from None


def _hashed(directory: Path, world: World, names: list[str]) -> dict[str, str]:
    """Hash of each file of a checkpoint, the work shared among ranks; of a file that cannot be read, why."""
    mine = {name: _hash_of(directory / name) for name in names[world.rank :: world.size]}
    merged = {name: found for part in world.all_gather_object(mine) for name, found in part.items()}
    return {name: merged[name] for name in names}


def _hash_of(path: Path) -> str:
    try:
        wait_for_file(path)
        return str(_entry(path)["xxh64"])
    except OSError as error:
        return error.strerror or str(error)


def _entry(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "xxh64": digest.hexdigest()}
