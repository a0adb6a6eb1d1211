"""What a run has to know of its packs, read once at its start and handed to all who need it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.config.check_data import is_remote, packs
from bd3_ds.config.schema import DataConfig
from bd3_ds.data.manifest import Manifest, read_manifest
from bd3_ds.data.mixture import samples_of_epoch
from bd3_ds.data.remote import fetch_facts
from bd3_ds.data.shards import list_shards, read_index
from bd3_ds.data.token_counts import read_token_counts
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class PackFacts:
    """One pack of a run.

    pack: as the recipe names it. directory: where its facts lie on this node. shard_cut: a hash of how many chunks each
    shard has, in order, which is what the order of samples knows of them. largest_shard: bytes, packed and unpacked.
    """

    pack: str
    directory: Path
    manifest: Manifest
    shard_cut: str
    largest_shard: int

    @cached_property
    def token_counts(self) -> np.ndarray:
        """How often each token occurs, int64 [vocabulary]; read once, when asked for. UserError without counts."""
        return read_token_counts(self.directory, self.manifest)


@dataclass(frozen=True)
class DataFacts:
    """Of all packs of a run: data.train's first, then those of data.mix in their order; at least one.

    samples: how many of each an epoch has.
    """

    packs: tuple[PackFacts, ...]
    samples: tuple[int, ...]

    @classmethod
    def of(cls, data: DataConfig, found: list[PackFacts]) -> DataFacts:
        """From the facts of every pack that `data` names."""
        return cls(tuple(found), tuple(samples_of_epoch(data, [facts.manifest.chunks for facts in found])))

    @property
    def train(self) -> PackFacts:
        """Of data.train."""
        return self.packs[0]

    @property
    def is_padded(self) -> bool:
        """Whether any pack has padding."""
        return any(facts.manifest.padding > 0 for facts in self.packs)

    @property
    def identity(self) -> dict[str, list[str]]:
        """What tells these packs from others: hashes of their tokens, and of their shards' cut.

        Both make the order of samples; where the packs lie and how their shards are compressed does not.
        """
        return {
            "pack_hashes": [facts.manifest.pack_hash for facts in self.packs],
            "content_hashes": [facts.manifest.content_hash for facts in self.packs],
            "shard_cuts": [facts.shard_cut for facts in self.packs],
        }

    @property
    def scored_tokens(self) -> float:
        """Scored tokens of a mean sequence of an epoch: all but its first one and padding.

        Raises UserError where there are none.
        """
        each = zip(self.samples, (facts.manifest for facts in self.packs), strict=True)
        padding = sum(samples * manifest.padding / manifest.chunks for samples, manifest in each)
        mean = self.train.manifest.length - 1 - padding / sum(self.samples)
        if mean <= 0:
            raise UserError(f"data.train={self.train.pack} has nothing to learn: all but first tokens is padding")
        return mean


def read_data_facts(data: DataConfig, check_files: bool = True) -> DataFacts:
    """Of the packs that `data` names. Those of remote packs are fetched to data.cache.

    check_files: see that the shards of local packs are there in their sizes. Raises UserError, with the key that names
    the pack, for one that cannot be read.
    """
    found = []
    for pack in packs(data):
        try:
            found.append(read_pack_facts(pack, data.cache, check_files))
        except UserError as error:
            raise UserError(f"{key_of(pack, data)}: {error}") from None
    return DataFacts.of(data, found)


def read_pack_facts(pack: str, cache: str, check_files: bool = True) -> PackFacts:
    """Of one pack; as `read_data_facts`, without the key in its errors."""
    directory = fetch_facts(pack, cache)
    manifest = read_manifest(directory)
    read: Callable[[Path], list[dict[str, Any]]] = read_index if check_files and not is_remote(pack) else list_shards
    shards = read(directory)
    return PackFacts(
        pack=pack,
        directory=directory,
        manifest=manifest,
        shard_cut=hashlib.sha256(repr([shard["samples"] for shard in shards]).encode()).hexdigest(),
        largest_shard=max((_bytes(shard["raw_data"]) + _bytes(shard["zip_data"]) for shard in shards), default=0),
    )


def key_of(pack: str, data: DataConfig) -> str:
    """The configuration key that names `pack`."""
    return "data.train" if pack == data.train else "data.mix"


def _bytes(part: dict[str, Any] | None) -> int:
    return int(part["bytes"]) if part else 0
