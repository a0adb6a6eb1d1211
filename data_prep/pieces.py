"""The interface of sources: text in pieces, the position in it, and its revision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Piece(NamedTuple):
    """A part of a document; `starts` where it is the document's first, `null` where a null stands for the document."""

    text: str
    starts: bool
    null: bool = False


def document(text: str | None) -> Piece:
    """A whole document as a piece; None is a null."""
    return Piece(text or "", True, text is None)


@dataclass
class Position:
    """How far reading is: `done` of `total`, both in bytes of the files or both in documents of a hub set.

    `total` is 0 where it is unknown, and for a hub set until its first document was read. `nulls` and `blank` count the
    documents that were left out so far: nulls, and those of no character but white space.
    """

    done: float = 0.0
    total: float = 0.0
    nulls: int = 0
    blank: int = 0


@dataclass(frozen=True)
class Source:
    """A source that was found but not yet read. `size` is its bytes on disk, 0 where that is unknown.

    `detokenizer` and `frame` are its defaults. `files` are those that are read, in order; `left_out` names beside them
    that are not. `specs` are the single sources of which it is made, where there are several; `spec` is then the words
    that name them.
    """

    name: str
    spec: str
    split: str | None
    detokenizer: str
    frame: str
    size: int
    read: Callable[[Position], Iterator[Piece]]
    find_revision: Callable[[], str | None] = lambda: None
    files: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()
    specs: tuple[str, ...] = ()

    def pieces(self, position: Position | None = None) -> Iterator[Piece]:
        """Read from the beginning, the same pieces in the same order at each call; keeps `position` up to date.

        Documents without text are left out, and counted in `position`. Raises UserError for what is damaged, missing or
        out of reach.
        """
        position = position or Position()
        position.done, position.total, position.nulls, position.blank = 0.0, float(self.size), 0, 0
        for piece in self.read(position):
            if piece.text.strip() or not piece.starts:
                yield Piece(whole_characters(piece.text), piece.starts)
            elif piece.null:
                position.nulls += 1
            else:
                position.blank += 1

    def revision(self) -> str | None:
        """The hub's commit that `pieces` reads, asked for at the first call; None for what is no hub set."""
        return self.find_revision()


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs, which JSON of web crawls has and no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
