"""Remote packs: the cache directory of a node, and downloads with retries.

CACHE/NAME-HASH/ is a pack in the making: `fetch_facts` puts manifest, index, token counts and tokenizer there,
streaming the shards that are read. Whoever needs the facts of a pack reads them in `pack_directory`, local or not.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bd3_ds.config.check_data import is_remote
from bd3_ds.data.manifest import MANIFEST, is_same_pack, read_manifest
from bd3_ds.data.pack import TOKENIZER_DIR
from bd3_ds.data.shards import INDEX
from bd3_ds.data.streaming_import import import_streaming
from bd3_ds.data.token_counts import COUNTS
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import require_writable

# A plain web server lists no directory, so the files that a pack may hold are asked for by name.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "characters.json",
)
OPTIONAL = (*(f"{TOKENIZER_DIR}/{name}" for name in TOKENIZER_FILES), COUNTS)
NEEDED = (INDEX, MANIFEST)  # the manifest last: where it is, the rest is
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt
TIMEOUT = 60.0  # seconds without an answer
_TRY_AGAIN = (408, 425, 429)  # the only refusals (4xx) that a later attempt may not meet
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (*_DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS)


class Missing(UserError):
    """The remote answers, and has no such file."""


class Refused(UserError):
    """The remote answers, and does not give the file to us; S3 may answer so where there is none."""


def pack_directory(pack: str, cache: str) -> Path:
    """The directory of `pack` on this node: its own, or the part of `cache` that is kept for its address."""
    if not is_remote(pack):
        return Path(pack)
    address = pack.rstrip("/")
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    return cache_root(cache) / f"{address.rsplit('/', 1)[-1]}-{digest}"


def cache_root(cache: str) -> Path:
    """The directory that data.cache names; {uid} in it stands for the user, so that no two users share one."""
    return Path(cache.replace("{uid}", str(os.getuid()))).expanduser()


def make_cache_root(cache: str) -> Path:
    """`cache_root`, made where it is not there, only for this user where its name is the user's.

    Raises UserError for one of the latter kind that another user has made.
    """
    root = cache_root(cache)
    if "{uid}" in cache and not root.is_dir():
        require_writable(root.parent)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if "{uid}" in cache and root.stat().st_uid != os.getuid():
        raise UserError(f"data.cache={root} belongs to another user; name a directory of your own on a local disk")
    return root


def fetch_facts(pack: str, cache: str) -> Path:
    """Have the facts of a pack in `pack_directory`, whole or not at all, and return it; processes of a node take turns.

    What is there is kept; whether the remote is still the same is asked once a node, if it can be reached. Raises
    UserError where the pack is not there, has changed, or cannot be fetched. A local pack is left to itself.
    """
    directory = pack_directory(pack, cache)
    if not is_remote(pack):
        return directory
    make_cache_root(cache)
    require_writable(directory.parent)
    directory.mkdir(parents=True, exist_ok=True)
    get = opener(pack)
    with turn(directory), tempfile.TemporaryDirectory(dir=directory, prefix=".facts-") as folder:
        aside = Path(folder)
        if (directory / MANIFEST).is_file():
            # One rank a node of a job fetches; a single process fetches whatever its environment says of ranks.
            if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0":
                _require_unchanged(pack, directory, get, aside)
            return directory
        for name in OPTIONAL:
            with suppress(Missing, Refused):
                patiently(lambda name=name: get(name, aside / name), f"{pack}/{name}", cache)  # type: ignore[misc]
        for name in NEEDED:
            try:
                patiently(lambda name=name: get(name, aside / name), f"{pack}/{name}", cache)  # type: ignore[misc]
            except Missing:
                raise UserError(
                    f"'{pack}' is not a data pack: it has no {name}; give the address of a directory that "
                    "`python -m data_prep.prepare` made"
                ) from None
        for name in filter(lambda name: (aside / name).is_file(), (*OPTIONAL, *NEEDED)):
            (directory / name).parent.mkdir(exist_ok=True)
            os.replace(aside / name, directory / name)
    return directory


def opener(pack: str) -> Callable[[str, Path], None]:
    """A function that fetches the file `name` of a remote pack to a path, once, by streaming's downloaders."""
    import_streaming()
    from streaming.base.storage import CloudDownloader

    import bd3_ds.data.http_download  # noqa: F401

    address = pack.rstrip("/")
    try:
        downloader: Any = CloudDownloader.get(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"'{pack}' needs a library that is not there ({error}); install it") from None

    def fetch(name: str, path: Path) -> None:
        path.unlink(missing_ok=True)  # streaming takes what an attempt left for the whole file
        try:
            downloader.download(f"{address}/{name}", str(path), TIMEOUT)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise

    return fetch


def patiently(fetch: Callable[[], None], what: str, place: str) -> None:
    """Call `fetch` until it succeeds, with growing pauses; says each time why it waits.

    Raises Missing or Refused at once, and UserError where the file cannot be written to `place`, or did not come in all
    attempts.
    """
    for pause in (*PAUSES, None):
        try:
            return fetch()
        except UserError:
            raise
        except Exception as error:  # the providers' exceptions have no class in common
            reason = " ".join(str(error).split()) or type(error).__name__
            status = _status(error)
            if isinstance(error, OSError) and error.errno in _UNWRITABLE:
                raise cannot_write(error, place, what) from None
            # huggingface_hub names so a file that it could not ask for.
            offline = type(error).__name__ == "LocalEntryNotFoundError"
            if status == 404 or (isinstance(error, FileNotFoundError) and not offline):
                raise Missing(f"'{what}' is not there ({reason})") from None
            refused = status is not None and 400 <= status < 500 and status not in _TRY_AGAIN
            if refused or "Credentials" in type(error).__name__:
                raise Refused(f"'{what}' is refused ({reason}); see that this machine may read it") from None
        if pause is None:
            raise UserError(
                f"'{what}' could not be fetched in {len(PAUSES) + 1} attempts ({reason}); when the address answers "
                "again, the same command continues"
            )
        say(f"{what} could not be fetched ({reason}); trying again in {pause:.0f} s")
        time.sleep(pause * random.uniform(1.0, 1.2))
    raise AssertionError


def cannot_write(error: OSError, place: str, what: str) -> UserError:
    """The sentence for a disk that takes no more."""
    fix = "free some space, lower data.cache_limit" if error.errno in _DISK_FULL else "make it writable"
    return UserError(f"cannot write {what} to {place}: {error.strerror}; {fix}, or name another directory (data.cache)")


def say(text: str) -> None:
    """A line on the console, from whichever process."""
    print(f"data: {text}", file=sys.stderr, flush=True)


def _require_unchanged(pack: str, directory: Path, get: Callable[[str, Path], None], aside: Path) -> None:
    try:
        for name in (MANIFEST, INDEX):
            get(name, aside / name)
    except Exception as error:  # what is kept here may be all that is needed
        say(f"{pack} cannot be asked whether it has changed ({' '.join(str(error).split())}); using {directory}")
        return
    there, here = read_manifest(aside), read_manifest(directory)
    fix = "remove that directory, or name another data.cache"
    if not is_same_pack(there.pack_hash, there.content_hash, here):
        raise UserError(
            f"'{pack}' has the pack hash {there.pack_hash[:12]} and {directory} keeps parts of another, "
            f"{here.pack_hash[:12]}; {fix}"
        )
    # The pack hash does not know how the tokens are cut into shards, and shards of both would be read as damaged.
    if (aside / INDEX).read_bytes() != (directory / INDEX).read_bytes():
        raise UserError(f"'{pack}' was replaced: {directory} keeps the same tokens in other shards; {fix}")


def _status(error: Exception) -> int | None:
    """The HTTP status in an exception of boto3, requests (hf) or urllib."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(error, "code", None) or getattr(response, "status_code", None)
    return found if isinstance(found, int) else None


@contextmanager
def turn(directory: Path) -> Iterator[None]:
    """Processes of a node that work on `directory` do so one after the other."""
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
