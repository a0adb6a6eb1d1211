"""The manifest of a pack: contents, provenance, hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.data.pack_hash import NO_PADDING, hash_of_pack
from bd3_ds.runtime.errors import UserError, alike, did_you_mean
from bd3_ds.runtime.files import read_json

if TYPE_CHECKING:
    from bd3_ds.data.tokenizer_base import Tokenizer

FORMAT = "bd3-ds pack 2"
MANIFEST = "manifest.json"
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
    of an older pack has only the content's, as `pack_hash`. `read_manifest` gives both; but where an older pack has
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
    """Of a pack made when there was only the hash of the content."""
    content = manifest.pack_hash
    now = content if manifest.padding else hash_of_pack(content, manifest.length, manifest.frame, NO_PADDING)
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


def is_same_pack(pack_hash: str, content_hash: str | None, manifest: Manifest) -> bool:
    """Whether the hashes that were kept of a pack are those of `manifest`.

    What was kept before there were two hashes is only the content's, and `content_hash` None; an older pack with
    padding has the content's under both names.
    """
    if pack_hash == manifest.pack_hash:
        return True
    only_content = pack_hash == (content_hash or pack_hash) or manifest.pack_hash == manifest.content_hash
    return only_content and (content_hash or pack_hash) == manifest.content_hash


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
