"""Whether a run that continues reads the packs it was started with."""

from __future__ import annotations

from typing import Any

from bd3_ds.config.check_data import packs
from bd3_ds.config.schema import DataConfig
from bd3_ds.data.manifest import is_same_pack, read_manifest
from bd3_ds.data.remote import pack_directory
from bd3_ds.data.shards import read_shard_cut
from bd3_ds.runtime.errors import UserError


def identity(data: DataConfig) -> dict[str, Any]:
    """What tells the packs of a run from others, data.train first: hashes of their tokens, and of their shards' cut.

    Both make the order of samples; where the packs lie and how their shards are compressed does not.
    """
    places = [pack_directory(pack, data.cache) for pack in packs(data)]
    manifests = [read_manifest(place) for place in places]
    return {
        "pack_hashes": [manifest.pack_hash for manifest in manifests],
        "content_hashes": [manifest.content_hash for manifest in manifests],
        "shard_cuts": [read_shard_cut(place) for place in places],
    }


def require_same_packs(data: DataConfig, saved: dict[str, Any], saved_by: str) -> None:
    """Raise UserError unless the packs are those that `saved`, a `Loader.state`, was counted in.

    What `saved` does not say, as that of earlier versions, is not compared. `saved_by` is the run's directory.
    """
    mend = f"name the pack it was started with, or start a new run_dir with train.init_from={saved_by}"
    now = identity(data)
    if len(saved.get("pack_hashes", now["pack_hashes"])) != len(now["pack_hashes"]):
        raise UserError(f"data.mix has another number of packs than {saved_by} was started with; {mend}")
    for i, pack in enumerate(packs(data)):
        key = "data.mix" if i else "data.train"
        manifest = read_manifest(pack_directory(pack, data.cache))
        before, cut_before = (
            saved.get("pack_hashes", now["pack_hashes"])[i],
            saved.get("shard_cuts", now["shard_cuts"])[i],
        )
        content = saved["content_hashes"][i] if "content_hashes" in saved else None
        differ, after = "another pack", manifest.pack_hash
        if is_same_pack(before, content, manifest):
            differ, before, after = "the same tokens cut into other shards", cut_before, now["shard_cuts"][i]
            if before == after:
                continue
        raise UserError(
            f"{key}: '{pack}' is {differ} (hash {after[:12]}) than {saved_by} was started with (hash "
            f"{before[:12]}), so its samples have another order; {mend}"
        )
