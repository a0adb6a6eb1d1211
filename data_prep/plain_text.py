"""Plain text files as one document, read in pieces that fit into memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from bd3_ds.runtime.errors import UserError
from data_prep.pieces import Piece

PIECE_CHARACTERS = 1 << 16


def text_blocks(path: Path, stream: io.TextIOWrapper, span: tuple[int, int] | None) -> Iterator[str]:
    """The characters of `stream` in blocks of PIECE_CHARACTERS, of a `span` those from its first to before its second.

    Raises UserError for a file that ends before its span does.
    """
    if span is None:
        yield from iter(lambda: stream.read(PIECE_CHARACTERS), "")
        return
    at, (first, last) = 0, span
    while at < last:
        block = stream.read(min(PIECE_CHARACTERS, (first if at < first else last) - at))
        if not block:
            raise UserError(f"--source: {path} has {at} characters, fewer than {last}: not the whole set; get it again")
        at += len(block)
        if at > first:
            yield block


def cut(blocks: Iterable[str]) -> Iterator[Piece]:
    """One document, which comes in blocks of PIECE_CHARACTERS but for the last, in pieces of about that size."""
    # Pieces are cut before a line's end: tokenizers that join white space to the word after it then give the same
    # tokens as for the whole file.
    rest, starts = "", True
    for block in blocks:
        rest += block
        if len(block) < PIECE_CHARACTERS:
            continue  # the end: nothing to gain from a cut
        end = max(rest.rfind("\n"), 0) or max(rest.rfind(" "), 0) or len(rest)
        if rest[:end].strip():
            yield Piece(rest[:end], starts)
            rest, starts = rest[end:], False
        elif starts:
            rest = rest[end:]
    if rest.strip() or (rest and not starts):
        yield Piece(rest, starts)
