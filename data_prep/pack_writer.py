"""Second stage of a preparation: chunks are written in groups, each an MDS directory, and one index over all.

    00000/shard.00000.mds.zstd ...   a group of chunks
    index.json                       all shards in order

Which chunks make a group is decided only by their number, so packs are the same to the byte at any number of workers.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bd3_ds.data.documents import document_numbers
from bd3_ds.data.manifest import FORMAT, MANIFEST, Manifest, TokenizerInfo
from bd3_ds.data.pack import TOKENIZER_DIR
from bd3_ds.data.pack_hash import PackHash
from bd3_ds.data.token_counts import COUNTS
from bd3_ds.runtime.files import read_json, sync, write_json
from data_prep.packing import Chunk, Tally, padded_places
from data_prep.work_directory import put_in_place, whole_directory, work_directory
from data_prep.workers import Workers, result

if TYPE_CHECKING:
    from concurrent.futures import Future

    from bd3_ds.data.tokenizer_base import Tokenizer

GIVEN = "given"  # the packing of chunks that were not packed here
GROUP_TOKENS = 1 << 22
SHARD_BYTES = 1 << 24  # unpacked; one shard is what random access unpacks at a time


class PackWriter:
    """Takes chunks one by one, has `workers` write them under `work`, and makes the pack of them.

    Groups that an earlier start has written are kept where they hold the same chunks.
    """

    def __init__(self, work: Path, tokenizer: Tokenizer, length: int, workers: Workers):
        self._pack, self._finished = work / "pack", work / "groups"
        for folder in (self._pack, self._finished):
            folder.mkdir(exist_ok=True)
        self._tokenizer, self._length, self._workers = tokenizer, length, workers
        self.dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._hash, self._counts = PackHash(), np.zeros(tokenizer.vocab_size, np.int64)
        self._group: list[Chunk] = []
        self._groups, self.chunks = 0, 0
        self._waiting: deque[Future[Any]] = deque()

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk; raises ValueError for another length, an id outside the vocabulary, or the mask id."""
        if chunk.tokens.shape != (self._length,):
            raise ValueError(f"chunk {self.chunks}: {chunk.tokens.shape} instead of {self._length} tokens")
        self._group.append(chunk)
        self.chunks += 1
        if len(self._group) * self._length >= GROUP_TOKENS:
            self._write_group()

    def finish(self, facts: Manifest) -> Manifest:
        """Write what is left, index, counts, tokenizer and manifest; `facts` with all that chunks tell filled in."""
        if self._group:
            self._write_group()
        while self._waiting:
            result(self._waiting.popleft())
        for path in self._pack.iterdir():
            if not path.is_dir() or path.name not in {_name(i) for i in range(self._groups)}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _merge_indexes(self._pack)
        np.save(self._pack / COUNTS, self._counts)
        self._tokenizer.save(self._pack / TOKENIZER_DIR)
        manifest = replace(
            facts,
            chunks=self.chunks,
            dtype=self.dtype,
            pack_hash=self._hash.pack(self._length, facts.frame),
            content_hash=self._hash.content(),
        )
        write_json(self._pack / MANIFEST, manifest.to_json())
        sync(self._pack)
        return manifest

    def _write_group(self) -> None:
        tokens = np.stack([chunk.tokens for chunk in self._group])  # [n, L]
        first = self.chunks - len(tokens)
        if tokens.min() < 0 or tokens.max() >= self._tokenizer.vocab_size:
            raise ValueError(f"chunks from {first} on: not ids below {self._tokenizer.vocab_size}")
        if (tokens == self._tokenizer.mask_id).any():
            raise ValueError(f"chunks from {first} on hold the mask id {self._tokenizer.mask_id}")
        text, padded = tokens, None
        if any(len(chunk.pad_starts) for chunk in self._group):
            starts, pads = zip(*((chunk.doc_starts, chunk.pad_starts) for chunk in self._group), strict=True)
            padded = document_numbers(starts, pads, self._length) < 0
            text = tokens[~padded]
        self._hash.add(tokens, padded)
        self._counts += np.bincount(text.ravel(), minlength=len(self._counts))
        marks = [(_bytes(chunk.doc_starts), _bytes(chunk.pad_starts)) for chunk in self._group]
        name, self._group = _name(self._groups), []
        self._groups += 1
        place, note = self._pack / name, self._finished / f"{name}.json"
        self._waiting.append(self._workers.submit(write_group, tokens.astype(self.dtype), marks, place, note))
        while len(self._waiting) > self._workers.count:
            result(self._waiting.popleft())


def write_pack(
    out: Path,
    chunks: Iterable[Chunk | tuple[np.ndarray, ...]],
    tokenizer: Tokenizer,
    length: int,
    *,
    name: str,
    source: str = "arrays",
    settings: dict[str, Any] | None = None,
) -> Manifest:
    """Write chunks (tokens [length], offsets at which documents begin, and at which padding begins) as the pack `out`.

    It appears whole or not, in place of one that was there. Each chunk counts as a document of its own start, bytes as
    0. Raises ValueError as `PackWriter.add` does.
    """
    tally = Tally()
    with work_directory(Path(out)) as work, Workers(1, lambda: None) as workers:
        writer = PackWriter(work, tokenizer, length, workers)
        for chunk in chunks:
            tokens, starts, *pads = (np.asarray(part) for part in chunk)
            writer.add(Chunk(tokens, starts, *pads))
            tally.documents += len(starts)
            tally.padding += padded_places(starts, pads[0], length) if pads else 0
        tally.tokens = writer.chunks * length - tally.padding
        manifest = writer.finish(facts(tokenizer, length, tally, name=name, source=source, settings=settings or {}))
        put_in_place(work / "pack", Path(out))
    return manifest


def facts(
    tokenizer: Tokenizer, length: int, tally: Tally, *, name: str, source: str, settings: dict[str, Any]
) -> Manifest:
    """A manifest without what `PackWriter.finish` finds out: chunks as they are given, of a text without a revision."""
    return Manifest(
        format=FORMAT,
        name=name,
        source=source,
        tokenizer=TokenizerInfo.of(tokenizer),
        length=length,
        packing=GIVEN,
        frame="none",
        detokenizer="none",
        revision=None,
        documents=tally.documents,
        tokens=tally.tokens,
        bytes=tally.bytes,
        dropped_tokens=tally.dropped_tokens,
        padding=tally.padding,
        chunks=0,
        dtype="",
        pack_hash="",
        settings=settings,
    )


def write_group(tokens: np.ndarray, marks: list[tuple[bytes, bytes]], place: Path, note: Path) -> None:
    """Write chunks [n, L] with their marks as the MDS folder `place`, unless `note` says that it holds them."""
    from xxhash import xxh3_128

    digest = xxh3_128(tokens.tobytes())
    digest.update(b"\0".join(b"%d %d " % (len(a), len(b)) + a + b for a, b in marks))
    wanted = {"digest": digest.hexdigest(), "dtype": str(tokens.dtype), "length": tokens.shape[1]}
    if place.is_dir() and note.is_file() and read_json(note, "note of a finished group") == wanted:
        return
    from bd3_ds.data.streaming_import import import_streaming

    note.unlink(missing_ok=True)
    columns = {"tokens": f"ndarray:{tokens.dtype}:{tokens.shape[1]}", "doc_starts": "bytes", "pad_starts": "bytes"}
    with whole_directory(place) as directory:
        writer = import_streaming().MDSWriter(
            out=str(directory), columns=columns, compression="zstd", hashes=["xxh64"], size_limit=SHARD_BYTES
        )
        for row, (starts, pads) in zip(tokens, marks, strict=True):
            writer.write({"tokens": row, "doc_starts": starts, "pad_starts": pads})
        writer.finish()
    write_json(note, wanted)


def _name(group: int) -> str:
    return f"{group:05d}"


def _bytes(offsets: np.ndarray) -> bytes:
    return offsets.astype("<u4").tobytes()


def _merge_indexes(directory: Path) -> None:
    shards = []
    for index in sorted(directory.glob("*/index.json"), key=lambda path: int(path.parent.name)):
        for shard in read_json(index, "index of a group")["shards"]:
            for part in ("raw_data", "zip_data"):
                if shard[part]:
                    shard[part]["basename"] = f"{index.parent.name}/{shard[part]['basename']}"
            shards.append(shard)
    write_json(directory / "index.json", {"version": 2, "shards": shards})
