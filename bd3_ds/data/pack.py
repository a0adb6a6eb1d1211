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

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.errors import UserError, alike, did_you_mean
from bd3_ds.runtime.files import read_json

if TYPE_CHECKING:
    import numpy as np

    from bd3_ds.data.tokenizer_base import Tokenizer

FORMAT = "bd3-ds pack 2"
MANIFEST = "manifest.json"
INDEX = "index.json"
TOKENIZER_DIR = "tokenizer"
COUNTS = "token_counts.npy"
_HELP = "make one with `python -m data_prep.prepare --source ... --tokenizer ... --length ... --out DIR`"


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the tokens, without its path."""

    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerInfo:
        """The facts of a loaded tokenizer."""
        return cls(**{fact.name: getattr(tokenizer, fact.name) for fact in fields(cls)})


@dataclass(frozen=True)
class Manifest:
    """What a pack holds.

    `tokens` counts the encoded text with the EOS between documents, `dropped_tokens` the part of it that filled no
    whole chunk at the end or, with the packing `no-split`, did not fit its document's chunk. `padding` counts the
    places that hold no text. The BOS and EOS of the frame `bos-eos` are in none of these. `bytes` is UTF-8 bytes of the
    text as it was encoded, after the detokenizer. `packing` is one of data_prep's PACKINGS, or `given`; `revision` the
    source's where it has one. `settings` are the options that made the pack, compared when it is asked for again.
    `files` are the files that were read, in order, each with its bytes; `left_out` counts the documents without text.

    `content_hash` is the SHA-256 of all chunks in order as little-endian uint32, whatever the shards; `pack_hash` is
    that of the protocol: of the content's, the length, the frame and where padding lies (`hash_of_pack`). The manifest
    of an older pack has the content's alone, as `pack_hash`. `read_manifest` gives both; but where an older pack has
    padding, of whose places the manifest does not tell, `pack_hash` stays the content's too.
    """

    format: str
    name: str
    source: str
    tokenizer: TokenizerInfo
    length: int
    packing: str
    frame: str
    detokenizer: str
    revision: str | None
    documents: int
    tokens: int
    bytes: int
    dropped_tokens: int
    padding: int
    chunks: int
    dtype: str
    pack_hash: str
    settings: dict[str, Any]
    content_hash: str = ""
    files: Sequence[tuple[str, int]] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `manifest.json` holds them."""
        return asdict(self)


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of the pack in `directory`; raises UserError if there is no pack of this format there."""
    if "://" in str(directory):
        raise UserError(f"data pack '{directory}' is remote; copy it to a local directory and name that")
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"data pack not found: '{directory}'; {_near(path, path.parent)}")
    if not (path / MANIFEST).is_file():
        raise UserError(f"'{directory}' is not a data pack (it has no {MANIFEST}); {_near(path, path)}")
    value = read_json(path / MANIFEST, "data pack manifest")
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise UserError(f"'{directory}' has the format {found!r}, not '{FORMAT}'; {_HELP}")
    try:
        manifest = Manifest(**value | {"tokenizer": TokenizerInfo(**value["tokenizer"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"data pack manifest {path / MANIFEST} is damaged ({error}); {_HELP}") from None
    return manifest if manifest.content_hash else _with_both_hashes(manifest)


def _with_both_hashes(manifest: Manifest) -> Manifest:
    """Of a pack made when there was the hash of the content alone."""
    content = manifest.pack_hash
    now = content if manifest.padding else hash_of_pack(content, manifest.length, manifest.frame, _NO_PADDING)
    return replace(manifest, pack_hash=now, content_hash=content)


def _near(path: Path, folder: Path) -> str:
    """The pack in `folder` that may be meant by `path`: one named alike, or the only ones where `path` holds packs."""
    try:
        packs = [place.name for place in folder.iterdir() if (place / MANIFEST).is_file()]
    except OSError:
        packs = []
    inside = [str(folder / name) for name in sorted(packs)] if folder == path else []
    named = [str(folder / name) for name in alike(path.name, packs)] if folder != path else inside
    return did_you_mean(str(path), [], first=named, otherwise=_HELP)


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


def read_shard_cut(directory: str | Path) -> str:
    """A hash of how many chunks each shard of a pack has, in order: what the order of samples knows of its shards."""
    samples = [shard["samples"] for shard in list_shards(Path(directory))]
    return hashlib.sha256(repr(samples).encode()).hexdigest()


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


def read_token_counts(directory: str | Path) -> np.ndarray:
    """How often each token occurs in a pack's text, int64 [vocabulary]; raises UserError where it has no counts."""
    import numpy as np

    manifest = read_manifest(directory)
    path = Path(directory) / COUNTS
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(
            f"data pack '{directory}' has no readable {COUNTS}, which masking by frequency needs; make the pack again"
        ) from None
    text = manifest.chunks * manifest.length - manifest.padding
    if counts.shape != (manifest.tokenizer.vocab_size,) or int(counts.sum()) != text:
        raise UserError(f"data pack '{directory}' is damaged: {COUNTS} does not fit its manifest; make the pack again")
    return counts.astype("int64")


_NO_PADDING = "none"


def hash_of_pack(content: str, length: int, frame: str, padding: str) -> str:
    """What tells a protocol from others: the hash of the tokens, how they are cut and framed, and a hash of padding."""
    facts = {"content": content, "length": length, "frame": frame, "padding": padding}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class PackHash:
    """SHA-256 over chunks of tokens, and one over the places of padding in them, independent of how they are stored."""

    def __init__(self) -> None:
        self._content, self._padding = hashlib.sha256(), hashlib.sha256()
        self._chunks, self._padded = 0, False

    def add(self, tokens: np.ndarray, padded: np.ndarray | None = None) -> None:
        """Append chunks; tokens [N, L], and bool [N, L] of which places are padding, None where none is."""
        import numpy as np

        self._content.update(tokens.astype("<u4").tobytes())
        if padded is not None:
            for row in np.flatnonzero(padded.any(axis=1)):
                number = int(self._chunks + row).to_bytes(8, "little")
                self._padding.update(number + np.packbits(padded[row]).tobytes())
                self._padded = True
        self._chunks += len(tokens)

    def content(self) -> str:
        """The hash of all tokens so far: `Manifest.content_hash`."""
        return self._content.hexdigest()

    def pack(self, length: int, frame: str) -> str:
        """The hash of the protocol: `Manifest.pack_hash`."""
        padding = self._padding.hexdigest() if self._padded else _NO_PADDING
        return hash_of_pack(self.content(), length, frame, padding)


def is_same_pack(pack_hash: str, content_hash: str | None, manifest: Manifest) -> bool:
    """Whether the hashes that were kept of a pack are those of `manifest`.

    What was kept before there were two hashes is the content's alone, and `content_hash` None; an older pack with
    padding has the content's under both names.
    """
    if pack_hash == manifest.pack_hash:
        return True
    only_content = pack_hash == (content_hash or pack_hash) or manifest.pack_hash == manifest.content_hash
    return only_content and (content_hash or pack_hash) == manifest.content_hash


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


def read_starts(column: bytes) -> np.ndarray:
    """The offsets that a chunk's column `doc_starts` or `pad_starts` holds, int64 [number of them]."""
    import numpy as np

    return np.frombuffer(column, "<u4").astype("int64")


def document_numbers(
    starts: Sequence[np.ndarray], pads: Sequence[np.ndarray], length: int, apart: bool = True
) -> np.ndarray:
    """Each place's document in its chunk, int64 [N, length], from the `doc_starts` and `pad_starts` of N chunks.

    A token's number is how many documents have begun up to it; 0 is the end of one that an earlier chunk began. Where
    documents are not kept `apart`, all text has the number 0. Padding has -1: it belongs to nobody and is never scored.
    """
    import numpy as np

    begun = np.zeros((len(starts), length), np.int64)
    padded = np.zeros((len(starts), length), bool)
    for row, (offsets, gaps) in enumerate(zip(starts, pads, strict=True)):
        np.add.at(begun[row], offsets, 1)
        for gap in gaps:
            later = offsets[offsets > gap]
            padded[row, gap : later[0] if len(later) else length] = True
    numbers = begun.cumsum(axis=1) if apart else np.zeros_like(begun)
    return np.where(padded, -1, numbers)


def open_pack(directory: str | Path) -> Pack:
    """Open a pack for reading; checks the presence and size of every shard, but not yet the hashes."""
    return Pack(directory)


def check_same_tokenizer(first: Manifest, *others: Manifest) -> None:
    """Raise UserError unless all packs were made with the same tokenizer."""
    for other in others:
        if other.tokenizer != first.tokenizer:
            raise UserError(
                f"the data packs '{first.name}' and '{other.name}' were made with different tokenizers "
                f"({_describe(first.tokenizer)} and {_describe(other.tokenizer)}); prepare both with one --tokenizer"
            )


def _describe(tokenizer: TokenizerInfo) -> str:
    return f"{tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:12]}"


def _damaged(directory: Path, file: Path, what: str) -> UserError:
    return UserError(
        f"data pack '{directory}' is damaged: shard {file.relative_to(directory)} {what}; "
        f"`python -m data_prep.verify {directory}` checks all shards and says how to mend them"
    )
