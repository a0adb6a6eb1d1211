"""The summary that is printed of a new pack."""

from __future__ import annotations

import shlex
from pathlib import Path


def report(out: Path, shown: str) -> None:
    """Print what the pack `out` holds, under the name `shown`, and what was left out of it."""
    from bd3_ds.data.manifest import read_manifest

    manifest = read_manifest(out)
    padding = f", {manifest.padding} places of padding" if manifest.padding else ""
    print(
        f"{shown}: {manifest.documents} documents, {manifest.tokens} tokens, {manifest.bytes} bytes, "
        f"{manifest.chunks} chunks of {manifest.length}, {manifest.dropped_tokens} tokens dropped{padding}, "
        f"pack hash {manifest.pack_hash}"
    )
    nulls, blank = manifest.left_out.get("nulls", 0), manifest.left_out.get("blank", 0)
    if nulls or blank:
        print(f"left out because they hold no text: {nulls} null, {blank} empty")


def say_next(shown: str, remote: bool) -> None:
    """Print what is usually done with a pack."""
    place = shlex.quote(shown)
    check = "" if remote else f"`python -m data_prep.verify {place}` checks it; "
    print(f"next: {check}train on it with data.train={place}, or score models on it with eval.sets.NAME={place}")
