"""Local packs in directories without write permission: their shards are unpacked in the cache.

CACHE/NAME-HASH/ then looks like the pack's own directory: its index, and a link to each of its shards' files, beside
which streaming unpacks them. Nothing is written where the pack is.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from bd3_ds.config.check_data import is_remote
from bd3_ds.data.remote import make_cache_root, pack_directory, say, turn
from bd3_ds.data.shards import INDEX, list_shards
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable, write_bytes


def shard_directory(pack: str, cache: str) -> Path:
    """Where this node unpacks the shards of `pack`: in its own directory if that can be written to, else in `cache`.

    Raises UserError where neither can.
    """
    directory = pack_directory(pack, cache)
    if is_remote(pack) or can_unpack_in(directory):
        return directory
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
    try:
        place = make_cache_root(cache) / f"{directory.resolve().name}-{digest}"
        require_writable(place)
        place.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        raise UserError(
            f"data pack '{pack}' is in a directory that cannot be written to, and neither can data.cache={cache} "
            f"({error}); name a directory on a local disk as data.cache"
        ) from None
    link_shards(directory, place)
    return place


def can_unpack_in(directory: Path) -> bool:
    """Whether every folder of shards in `directory` can be written to."""
    folders = {directory, *((directory / name).parent for name in _shard_files(directory))}
    return all(os.access(folder, os.W_OK | os.X_OK) for folder in folders if folder.is_dir())


def link_shards(directory: Path, place: Path) -> None:
    """Make `place` look like the pack in `directory`; processes of a node take turns, and what is right stays."""
    with turn(place):
        if not (place / INDEX).is_file():
            say(f"{directory} cannot be written to: its shards are unpacked in {place} (data.cache)")
        for name in _shard_files(directory):
            link, target = place / name, (directory / name).resolve()
            if not target.is_file() or _leads_to(link, target) or (link.is_file() and not link.is_symlink()):
                continue  # what an earlier start unpacked is checked against its hash like any other
            link.parent.mkdir(parents=True, exist_ok=True)
            aside = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
            aside.symlink_to(target)
            os.replace(aside, link)
        index = (directory / INDEX).read_bytes()
        if not (place / INDEX).is_file() or (place / INDEX).read_bytes() != index:
            write_bytes(place / INDEX, index)


def _shard_files(directory: Path) -> list[str]:
    """The stored files, and the unpacked ones, of all shards."""
    parts = [shard[part] for shard in list_shards(directory) for part in ("zip_data", "raw_data")]
    return [str(part["basename"]) for part in parts if part]


def _leads_to(link: Path, target: Path) -> bool:
    return link.is_symlink() and os.readlink(link) == str(target)
