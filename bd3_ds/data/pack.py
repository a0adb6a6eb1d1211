"""A pack: text frozen as token chunks of one length, in MDS shards with a manifest and its tokenizer.

    index.json                     all shards, in order, for mosaicml-streaming
    00000/shard.*.mds.zstd, ...    the chunks
    manifest.json                  what they are: `Manifest`
    token_counts.npy               how often each token occurs in the chunks, padding left out
    tokenizer/                     what `load_tokenizer` needs to read them

A chunk has three columns: `tokens` (uint16 or uint32 by vocabulary size), `doc_starts` and `pad_starts` (bytes: the
uint32 offsets in the chunk at which a document begins, and at which padding begins, which lasts to the next document or
the chunk's end; streaming's array columns cannot be empty, and these often are).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.data.documents import document_numbers, read_starts
from bd3_ds.data.manifest import read_manifest
from bd3_ds.data.shards import read_index, read_shard_file
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from bd3_ds.data.tokenizer_base import Tokenizer

TOKENIZER_DIR = "tokenizer"


class Pack:
    """Random access to the chunks of a pack; one shard at a time is unpacked and checked against its hash.

    Raises UserError naming the shard where one is damaged. `tokenizer` loads the pack's own tokenizer.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self.index = read_index(directory)
        samples = sum(shard["samples"] for shard in self.index)
        if samples != self.manifest.chunks:
            raise UserError(
                f"data pack '{directory}' is damaged: its index has {samples} chunks, its manifest "
                f"{self.manifest.chunks}; make the pack again"
            )
        from bd3_ds.data.streaming_import import import_streaming

        self._dataset = import_streaming().LocalDataset(local=str(directory))
        self._shard: Callable[[int], bytes] = lru_cache(maxsize=2)(self._read_shard)

    def __len__(self) -> int:
        return self.manifest.chunks

    @property
    def tokenizer(self) -> Tokenizer:
        from bd3_ds.data.tokenizer import load_tokenizer

        return load_tokenizer(str(self.directory / TOKENIZER_DIR))

    def tokens(self, i: int) -> np.ndarray:
        """Chunk i, int64 [L]."""
        return self._sample(i)["tokens"].astype("int64")

    def doc_starts(self, i: int) -> np.ndarray:
        """The offsets in chunk i at which a document begins, int64 [number of them]."""
        return read_starts(self._sample(i)["doc_starts"])

    def all_tokens(self, limit: int | None = None) -> np.ndarray:
        """The first `limit` chunks, or all, int64 [N, L]."""
        import numpy as np

        count = len(self) if limit is None else min(limit, len(self))
        out = np.empty((count, self.manifest.length), np.int64)
        for i in range(count):
            out[i] = self._sample(i)["tokens"]
        return out

    def pad_starts(self, i: int) -> np.ndarray:
        """The offsets in chunk i at which padding begins, int64 [number of them]."""
        return read_starts(self._sample(i)["pad_starts"])

    def all_documents(self, limit: int | None = None, apart: bool = True) -> np.ndarray | None:
        """Each place's document (`document_numbers`) in the first `limit` chunks, or all, int64 [N, L].

        None where there is nothing to tell: the documents are not kept `apart`, and nothing is padding.
        """
        if not apart and not self.manifest.padding:
            return None
        rows = range(len(self) if limit is None else min(limit, len(self)))
        starts, pads = [self.doc_starts(i) for i in rows], [self.pad_starts(i) for i in rows]
        return document_numbers(starts, pads, self.manifest.length, apart)

    def _sample(self, i: int) -> dict[str, Any]:
        import numpy as np

        if not 0 <= i < len(self):
            raise IndexError(f"chunk {i} of {len(self)}")
        shard, row = self._dataset.spanner[i]
        data = self._shard(int(shard))
        begin, end = np.frombuffer(data, np.uint32, count=2, offset=4 * (1 + row))
        return self._dataset.shards[shard].decode_sample(data[begin:end])

    def _read_shard(self, shard: int) -> bytes:
        from streaming.base.compression import decompress

        entry = self.index[shard]
        data = read_shard_file(self.directory, entry)
        return decompress(entry["compression"], data) if entry["zip_data"] else data


def open_pack(directory: str | Path) -> Pack:
    """Open a pack for reading; checks the presence and size of every shard, but not yet the hashes."""
    return Pack(directory)
