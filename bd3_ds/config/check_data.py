"""The packs that `data:` names, and rules that compare its values, before any pack is looked at."""

from __future__ import annotations

import re

from bd3_ds.config.schema import DataConfig
from bd3_ds.runtime.errors import did_you_mean

UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}
REMOTE = ("s3", "http", "https", "hf", "gs", "oci", "azure", "azure-dl", "sftp")


def is_remote(pack: str) -> bool:
    """Whether `pack` is an address rather than a directory."""
    return "://" in pack


def packs(data: DataConfig) -> list[str]:
    """data.train and the packs that are mixed in, in their order."""
    return [data.train, *data.mix]


def size_in_bytes(text: str) -> int | None:
    """'100gb' -> bytes; None where `text` is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?b)?", text.strip().lower())
    return int(float(found[1]) * UNITS[found[2] or ""]) if found else None


def data_problems(data: DataConfig) -> list[str]:
    """A sentence for every impossible combination."""
    return [*_remotes(data), *_mix(data)]


def _remotes(data: DataConfig) -> list[str]:
    problems = [
        f"data pack '{pack}' has the unknown protocol '{protocol}'; {did_you_mean(protocol, REMOTE)}"
        for pack in packs(data)
        if is_remote(pack) and (protocol := pack.partition("://")[0]) not in REMOTE
    ]
    if data.cache_limit is None:
        return problems
    local = [pack for pack in packs(data) if not is_remote(pack)]
    if not size_in_bytes(data.cache_limit):
        problems.append(f"data.cache_limit={data.cache_limit} is no size; write one such as 100gb, or null")
    elif local:  # what is evicted is deleted, and of a local pack there is no other copy
        problems.append(
            f"data.cache_limit={data.cache_limit} bounds what is kept of remote packs, and '{local[0]}' is local; "
            "set it to null"
        )
    return problems


def _mix(data: DataConfig) -> list[str]:
    problems = [
        f"data.mix gives '{pack}' the share {share}; a share lies above 0 and below 1"
        for pack, share in data.mix.items()
        if not 0 < share < 1
    ]
    if not problems and (total := sum(data.mix.values())) >= 1:
        problems.append(f"data.mix has shares that sum to {total:g}; leave a part of 1 for data.train")
    if data.train in data.mix:
        problems.append(f"data.mix holds data.train='{data.train}' itself; it has what the other shares leave")
    if data.mix and not data.shuffle:
        problems.append("data.mix needs data.shuffle=true: without it the packs would come one after the other")
    return problems
