"""A rank's part of a run's tensors as a file, and any part of any tensor out of such files.

A piece is named `kind/tensor:start`: elements start … start + n of the flat tensor. Whoever reads asks for elements and
not for files, so that ranks and ZeRO stages may be others than those that wrote: the idea of universal checkpoints
(Lian et al. 2024).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import share, sync

SUFFIX = ".safetensors"


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
    share(path)
    sync(path)


def as_os_error(error: Exception) -> OSError:
    """What the system said, out of safetensors' "I/O error: No space left on device (os error 28)"."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))


class Shards:
    """The pieces of a checkpoint's files; only what is asked for is read."""

    def __init__(self, directory: Path):
        from safetensors import safe_open

        self._directory = directory
        self._places: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)  # start, elements, lazy tensor
        for path in sorted(directory.glob(f"*{SUFFIX}")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118
                name, _, start = key.rpartition(":")
                lazy = file.get_slice(key)
                self._places[name].append((int(start), lazy.get_shape()[0], lazy))

    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fill the flat tensor `into` with elements from `start` on; raises UserError where some are nowhere."""
        end, found = start + len(into), 0
        for begin, count, lazy in self._places.get(f"{kind}/{name}", []):
            first, last = max(start, begin), min(end, begin + count)
            if first < last:
                into[first - start : last - start] = lazy[first - begin : last - begin].to(into.device)
                found += last - first
        if found != len(into):
            raise UserError(
                f"{self._directory} holds {found} of the {len(into)} numbers of {kind}/{name} from {start} on; it was "
                "saved by another model"
            )
