"""Whether a resumed run reads the packs it was started with."""

from __future__ import annotations

from typing import Any

from bd3_ds.data.data_facts import DataFacts
from bd3_ds.data.manifest import is_same_pack
from bd3_ds.runtime.errors import UserError


def require_same_packs(facts: DataFacts, saved: dict[str, Any], saved_by: str) -> None:
    """Raise UserError unless the packs are those that `saved`, a `Loader.state`, was counted in.

    What `saved` does not say, as that of earlier versions, is not compared. `saved_by` is the run's directory.
    """
    fix = f"name the pack it was started with, or start a new run_dir with train.init_from={saved_by}"
    now = facts.identity
    if len(saved.get("pack_hashes", now["pack_hashes"])) != len(now["pack_hashes"]):
        raise UserError(f"data.mix has another number of packs than {saved_by} was started with; {fix}")
    for i, pack in enumerate(facts.packs):
        key = "data.mix" if i else "data.train"
        before, cut_before = (
            saved.get("pack_hashes", now["pack_hashes"])[i],
            saved.get("shard_cuts", now["shard_cuts"])[i],
        )
        content = saved["content_hashes"][i] if "content_hashes" in saved else None
        differ, after = "another pack", pack.manifest.pack_hash
        if is_same_pack(before, content, pack.manifest):
            differ, before, after = "the same tokens cut into other shards", cut_before, pack.shard_cut
            if before == after:
                continue
        raise UserError(
            f"{key}: '{pack.pack}' is {differ} (hash {after[:12]}) than {saved_by} was started with (hash "
            f"{before[:12]}), so its samples have another order; {fix}"
        )
