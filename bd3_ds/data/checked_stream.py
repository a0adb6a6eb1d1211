"""streaming's Stream and StreamingDataset with verified shards, retried downloads and one-sentence errors.

Import it only after `import_streaming()`. streaming checks a shard when it is unpacked, but not one that an earlier run
unpacked; an exception in its threads ends as a silent end of data, and one in a loader process as text.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import bd3_ds.data.streaming_ready  # noqa: F401

# isort: split
from streaming import Stream, StreamingDataset
from streaming.base.compression import decompress
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hash

from bd3_ds.config.check_data import is_remote
from bd3_ds.data.remote import Missing, cannot_write, opener, patiently, say
from bd3_ds.data.shards import INDEX
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

HASH = "xxh64"
ATTEMPTS = 3  # at a shard that comes damaged from a remote
LEFT_BEHIND = 3600.0  # seconds after which nobody writes to a temporary file any more

# It warns of replication, which the loader has accounted for.
logging.getLogger("streaming.base.dataset").setLevel(logging.ERROR)


class CheckedStream(Stream):
    """The shards of `pack`, a directory or an address, in `directory`; `samples` of them an epoch, None: all once."""

    def __init__(self, pack: str, directory: Path, samples: int | None = None):
        remote = pack.rstrip("/") if is_remote(pack) else None
        self.pack = pack
        self._get = opener(pack) if remote else None
        super().__init__(remote=remote, local=str(directory.resolve()), choose=samples)

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        """The shards of the index; raises UserError where it is missing or damaged."""
        path = Path(self.local, INDEX)
        read_json(path, "data pack index")
        try:
            found: list[Any] = super().get_shards(world, allow_unsafe_types)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"data pack index {path} is damaged ({error}); make the pack again") from None
        return found

    def prepare_shard(self, shard: Any) -> int:
        """Have the shard's plain file, made from the stored one; returns the bytes that the directory grew by."""
        try:
            grown: int = super().prepare_shard(shard)
        except OSError as error:
            name = shard.file_pairs[0][0].basename
            if self.remote is not None or Path(self.local) != Path(self.pack).resolve():
                raise cannot_write(error, self.local, f"shard {name}") from None
            raise UserError(
                f"data pack '{self.pack}': shard {name} cannot be unpacked beside its compressed file: "
                f"{error.strerror}; make room there, or copy the pack to a directory that can be written to"
            ) from None
        return grown

    def _prepare_shard_part(self, raw_info: Any, zip_info: Any = None, compression: str | None = None) -> int:
        infos = [info for info in (raw_info, zip_info) if info]
        before = sum(info.bytes for info in infos if self._path(info).is_file())
        if not self._path(raw_info).is_file():
            data = self._stored(zip_info or raw_info)
            if zip_info:
                self._write(self._path(raw_info), decompress(compression, data))
        if zip_info and not self.safe_keep_zip:
            self._path(zip_info).unlink(missing_ok=True)
        return sum(info.bytes for info in infos if self._path(info).is_file()) - before

    def _stored(self, info: Any) -> bytes:
        """The content of the stored file, fetched if need be, with the right hash."""
        path = self._path(info)
        for _ in range(ATTEMPTS):
            if not path.is_file():
                self._fetch(info, path)
            data = path.read_bytes()
            if get_hash(HASH, data) == info.hashes.get(HASH):
                return data
            wrong = "does not match its hash"
            if len(data) != info.bytes:
                wrong = f"has {len(data)} bytes instead of {info.bytes}"
            if self.remote is None:
                break
            path.unlink()
            say(f"{path} {wrong}; fetching it again")
        raise self.damaged(info, wrong)

    def _fetch(self, info: Any, path: Path) -> None:
        if self._get is None:
            raise self.damaged(info, "is missing")
        get, aside = self._get, _aside(path)
        try:
            patiently(lambda: get(info.basename, aside), f"{self.remote}/{info.basename}", self.local)
        except Missing:
            raise self.damaged(info, "is missing") from None
        _put(aside, path)

    def _write(self, path: Path, data: bytes) -> None:
        aside = _aside(path)
        try:
            aside.write_bytes(data)
            _put(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def is_sound(self, shard: Any) -> bool:
        """Whether the plain file is there with the right hash; a wrong one that can be made again is removed.

        Raises UserError for a wrong one that nothing can be made from.
        """
        for raw_info, zip_info in shard.file_pairs:
            path = self._path(raw_info)
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return False
            except OSError as error:
                raise self.damaged(raw_info, f"cannot be read ({error.strerror})") from None
            if get_hash(HASH, data) != raw_info.hashes.get(HASH):
                if zip_info is None and self.remote is None:
                    raise self.damaged(raw_info, "does not match its hash")
                path.unlink(missing_ok=True)
                say(f"{path} does not match its hash; making it again")
                return False
        return True

    def sweep(self) -> None:
        """Remove what killed processes left half written.

        By age, because who writes may be a run in another container or on another host, whose processes are not seen
        from here; to write one shard takes minutes at most.
        """
        for path in Path(self.local).rglob(".shard.*"):
            with suppress(FileNotFoundError):  # its writer, or another run's sweep, may be faster
                if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                    path.unlink()

    def damaged(self, info: Any, what: str) -> UserError:
        """The sentence for a shard that cannot be read."""
        check = f"`python -m data_prep.verify {self.pack}` checks all shards"
        if self.remote is not None:
            check = "`python -m data_prep.verify` checks all shards of a local copy"
        return UserError(
            f"data pack '{self.pack}' is damaged: shard {info.basename} {what}; {check}; make the pack again with "
            "data_prep.prepare --overwrite, or copy that shard anew"
        )

    def _path(self, info: Any) -> Path:
        return Path(self.local, info.basename)


def _aside(path: Path) -> Path:
    """A name to write `path` under first, of no other process: runs of several hosts may unpack one pack."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _put(aside: Path, path: Path) -> None:
    """Give the file its name; if it was swept away, another process's `path` is as good: readers check its hash."""
    try:
        os.replace(aside, path)
    except FileNotFoundError:
        if not path.is_file():
            raise


class CheckedDataset(StreamingDataset):
    """Yields samples; after a failure that a user can fix it yields that UserError, again and again.

    As a sample, because an exception would come out of a loader process as a text with a traceback.
    """

    def __init__(self, streams: list[CheckedStream], **options: Any):
        self._sound: set[int] = set()
        self._failure: BaseException | None = None
        self._at_work: set[int] = set()
        super().__init__(streams=streams, validate_hash=HASH, **options)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except Exception as error:
            self._failure = self._failure or error
        while self._failure is not None:
            if not isinstance(self._failure, UserError):
                raise self._failure
            yield self._failure

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """The sample and its number (`id`), from a shard that was found sound by this process."""
        shard_id, _ = self.spanner[sample_id]
        if shard_id not in self._sound:
            self._make_sound(shard_id)
        return {**super().get_item(sample_id, retry), "id": sample_id}

    def _make_sound(self, shard_id: int) -> None:
        stream = self.streams[self.stream_per_shard[shard_id]]
        for _ in range(8):  # it may be evicted in between
            if stream.is_sound(self.shards[shard_id]):
                self._sound.add(shard_id)
                return
            self.prepare_shard(shard_id)
        raise stream.damaged(self.shards[shard_id].file_pairs[0][0], "cannot be kept whole")

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Have the shard on this node; after a failure others try too, where streaming would let them wait for ever."""
        self._at_work.add(shard_id)
        try:
            return super().prepare_shard(shard_id, blocking)
        except UserError as error:
            failure = UserError(*error.messages)
        except ValueError as error:
            if "eviction" not in str(error):
                raise
            failure = UserError(
                f"data.cache_limit={self.cache_limit} bytes is too little for the shards that are read at once; raise "
                "it, or lower data.workers"
            )
        finally:
            self._at_work.discard(shard_id)
        # Out of the handlers, the failed call's frame is gone, and with it its hold on the lock of the cache. Who waits
        # for the shard waits until it is local; told that it is, they find no file, try themselves, and fail or not.
        self._shard_states[shard_id] = _ShardState.LOCAL
        raise failure

    def give_up(self) -> None:
        """Before this process ends in the middle of a shard: leave it to the others, who would wait for it for ever."""
        for shard_id in list(self._at_work):
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                self._shard_states[shard_id] = _ShardState.LOCAL

    def on_exception(self, future: Future[None]) -> None:
        """A thread of streaming's has ended; its failure is kept for `__iter__`, which the event ends."""
        error = future.exception()
        if error is not None:
            self._failure = self._failure or error
            self._event.set()
            self._iterator.on_exit()  # else the end of the iteration would wait for this thread
