"""Checkpoint shards: each rank's tensors in one file, and any part of any tensor read out of such files.

A piece is named `kind/tensor:start`: elements start … start + n of the flat tensor. Readers request element ranges and
not files, so that world size and ZeRO stage may change: the idea of universal checkpoints (Lian et al. 2024). The index
says which file holds which elements, so that a rank opens only the files that it reads from.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bd3_ds.checkpoint.manifest import INDEX, MANIFEST, SUFFIX
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import apply_umask, read_json, sync, wait_for_file, write_text

Layout = dict[str, list[tuple[int, int]]]  # `kind/tensor` -> (start, elements) of its pieces in a file


def shard_file(rank: int) -> str:
    """Name of a rank's file inside a checkpoint."""
    return f"rank-{rank:05d}{SUFFIX}"


def piece(kind: str, name: str, start: int) -> str:
    """Name of a piece."""
    return f"{kind}/{name}:{start}"


def write_shard(path: Path, pieces: Mapping[str, Tensor]) -> None:
    """Write flat CPU tensors under the names of `piece`, and flush them to the disk; raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(pieces), path)
    except SafetensorError as error:
        raise as_os_error(error) from None
    apply_umask(path)
    sync(path)


def as_os_error(error: Exception) -> OSError:
    """What the system said, out of safetensors' "I/O error: No space left on device (os error 28)"."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))


def layout(pieces: Mapping[str, Tensor]) -> Layout:
    """What a rank's file holds."""
    found: Layout = defaultdict(list)
    for key, tensor in pieces.items():
        name, _, start = key.rpartition(":")
        found[name].append((int(start), len(tensor)))
    return dict(found)


def write_index(path: Path, files: Mapping[str, Layout]) -> None:
    """Write what all files of a checkpoint hold; raises OSError."""
    write_text(path, json.dumps(files, separators=(",", ":")) + "\n")


class Shards:
    """The pieces of a checkpoint's files; only what is asked for is read, and only files that hold it are opened.

    A checkpoint of an earlier version has no index: there every file is opened to see what it holds.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._open: dict[str, Any] = {}
        self._places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)  # start, elements, file
        for file, pieces in self._files():
            for name, places in pieces.items():
                self._places[name] += [(start, count, file) for start, count in places]

    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fill the flat tensor `into` with elements from `start` on; raises UserError where some are nowhere."""
        end, found = start + len(into), 0
        for begin, count, file in self._places.get(f"{kind}/{name}", []):
            first, last = max(start, begin), min(end, begin + count)
            if first < last:
                lazy = self._opened(file).get_slice(piece(kind, name, begin))
                into[first - start : last - start] = lazy[first - begin : last - begin].to(into.device)
                found += last - first
        if found != len(into):
            raise UserError(
                f"{self._directory} holds {found} of the {len(into)} numbers of {kind}/{name} from {start} on; it was "
                "saved by another model"
            )

    def _files(self) -> list[tuple[str, Layout]]:
        """What each file holds."""
        manifest = self._directory / MANIFEST
        there = read_json(manifest, "checkpoint manifest")["files"] if wait_for_file(manifest) else {}
        if INDEX in there:
            wait_for_file(self._directory / INDEX)
            return list(read_json(self._directory / INDEX, "index of the checkpoint").items())
        files = [name for name in sorted(there) if name.endswith(SUFFIX)]
        return [(name, _layout_of(self._opened(name))) for name in files]

    def _opened(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            wait_for_file(self._directory / name)
            self._open[name] = safe_open(self._directory / name, framework="pt")
        return self._open[name]


def _layout_of(file: Any) -> Layout:
    found: Layout = defaultdict(list)
    for key in file.keys():  # noqa: SIM118
        name, _, start = key.rpartition(":")
        found[name].append((int(start), file.get_slice(key).get_shape()[0]))
    return found
