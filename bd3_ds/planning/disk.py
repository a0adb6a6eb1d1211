"""The disk that a run fills: checkpoints, exports, records, curves and what is cached of remote packs, in bytes."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bd3_ds.config.check_data import is_remote, packs, size_in_bytes
from bd3_ds.config.registries import OPTIMIZERS
from bd3_ds.config.schema import RunConfig
from bd3_ds.data.remote import pack_directory
from bd3_ds.data.shards import INDEX, list_shards
from bd3_ds.runtime.errors import UserError

EXPORT_BYTES = 4  # of each number of a model: the average, in fp32
# Seen in runs: a line of records/train.jsonl, and all points of TensorBoard that one train.log_every writes.
RECORD_BYTES, POINTS_BYTES = 300, 1_500


@dataclass(frozen=True)
class Disk:
    """Bytes under run_dir at the end, when they are most, and `cache` under data.cache of each node.

    checkpoints: how many lie there at once, the one that is being written with them; cache: None where not known.
    """

    checkpoint: int
    checkpoints: int
    export: int
    exports: int
    records: int
    tensorboard: int
    cache: int | None

    @property
    def run_dir(self) -> int:
        """All that run_dir holds."""
        return self.checkpoint * self.checkpoints + self.export * self.exports + self.records + self.tensorboard

    def as_dict(self) -> dict[str, Any]:
        """The parts and the sum."""
        return {**asdict(self), "run_dir": self.run_dir}


def disk_of(run: RunConfig, parameters: int) -> Disk:
    """What a whole run leaves, from its configuration; the numbers of checkpoints and exports are the most at once."""
    train = run.train
    steps = train.total_steps
    written = -(-steps // train.checkpoint_every)  # the last step always gets one
    kept = min(train.keep_checkpoints, written)
    for_good = steps // train.keep_every if train.keep_every else 0
    # A new one is complete before the oldest goes.
    checkpoints = min(kept + for_good + 1, max(written, kept + for_good))
    exports = -(-steps // train.export_every)
    if train.keep_exports is not None:
        exports = min(exports, train.keep_exports + 1)
    return Disk(
        # In fp32: weights, their average, what the optimizer keeps.
        checkpoint=4 * (2 + len(OPTIMIZERS[run.optim.name].state)) * parameters,
        checkpoints=checkpoints,
        export=EXPORT_BYTES * parameters,
        exports=exports,
        records=RECORD_BYTES * steps,
        tensorboard=POINTS_BYTES * (steps // train.log_every),
        cache=_cache(run),
    )


def free_at(path: str) -> int:
    """Bytes that are free where `path` is, or will be made; what a run there holds already counts as free."""
    place = Path(path).absolute()
    there = 0
    for file in place.rglob("*") if place.is_dir() else ():
        with suppress(OSError):  # a running run deletes some meanwhile
            there += file.stat().st_size
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free + there


def _cache(run: RunConfig) -> int | None:
    """What each node keeps of remote packs: at most data.cache_limit, else all shards; 0 where all packs are local."""
    remote = [pack for pack in packs(run.data) if is_remote(pack)]
    if not remote:
        return 0
    if run.data.cache_limit is not None:
        return size_in_bytes(run.data.cache_limit)
    total = 0
    for pack in remote:
        directory = pack_directory(pack, run.data.cache)
        try:
            shards = list_shards(directory) if (directory / INDEX).is_file() else []
        except UserError:
            shards = []
        if not shards:
            return None
        total += sum(shard["raw_data"]["bytes"] for shard in shards)  # kept unpacked; the packed file goes
    return total
