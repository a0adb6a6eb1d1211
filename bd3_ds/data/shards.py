"""The shards of a pack: its index, and its files, verified by size and hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

INDEX = "index.json"


def list_shards(directory: Path) -> list[dict[str, Any]]:
    """The shards that a pack's index lists, whether their files are there or not; raises UserError without an index."""
    path = directory / INDEX
    index = read_json(path, "data pack index")
    try:
        shards = list(index["shards"])
        for shard in shards:
            stored = stored_file(shard)
            str(stored["basename"]), int(stored["bytes"]), dict(stored["hashes"]), int(shard["samples"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"data pack index {path} is damaged ({error}); copy it anew or make the pack again") from None
    return shards


def read_index(directory: str | Path) -> list[dict[str, Any]]:
    """`list_shards`, with every shard file there in its size; raises UserError that names the first that is not."""
    path = Path(directory)
    shards = list_shards(path)
    for shard in shards:
        stored = stored_file(shard)
        file = path / stored["basename"]
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            raise _damaged(path, file, "is missing")
        if size != stored["bytes"]:
            raise _damaged(path, file, f"has {size} bytes instead of {stored['bytes']}")
    return shards


def stored_file(shard: dict[str, Any]) -> dict[str, Any]:
    """The index entry of the file that a shard is stored in: the compressed one where there is one."""
    return shard["zip_data"] or shard["raw_data"]


def read_shard_file(directory: Path, shard: dict[str, Any]) -> bytes:
    """The bytes of the file that an index entry names, checked against its hashes; raises UserError for damage."""
    from bd3_ds.data.streaming_import import import_streaming

    import_streaming()
    from streaming.base.hashing import get_hash

    stored = stored_file(shard)
    file = directory / stored["basename"]
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _damaged(directory, file, f"cannot be read ({error.strerror})") from None
    if len(data) != stored["bytes"]:
        raise _damaged(directory, file, f"has {len(data)} bytes instead of {stored['bytes']}")
    if any(get_hash(name, data) != value for name, value in stored["hashes"].items()):
        raise _damaged(directory, file, "does not match its hash")
    return data


def _damaged(directory: Path, file: Path, what: str) -> UserError:
    return UserError(
        f"data pack '{directory}' is damaged: shard {file.relative_to(directory)} {what}; "
        f"`python -m data_prep.verify {directory}` checks all shards and says how to mend them"
    )
