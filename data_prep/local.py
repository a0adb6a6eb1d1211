"""Sources of local files and directories."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bd3_ds.runtime.errors import UserError
from data_prep.catalog import NamedSet, check_split
from data_prep.files import Layout, count_documents, read_file
from data_prep.find import find_files, find_set
from data_prep.packing import NONE
from data_prep.pieces import Piece, Position, Source


def any_text(path: Path, split: str | None, field: str | None) -> Source:
    """A file or directory of text of no known set; without a split all of it."""
    path = path.resolve()
    if split is not None and not path.is_dir():
        raise _no_split(path, split)
    layout = Layout(field or "text")
    files = find_files(path, split, layout)
    name = path.name.split(".")[0] or "text"
    return Source(name, str(path), split, "none", NONE, _size(files), lambda position: _read(files, layout, position))


def named_set(name: str, path: Path, split: str | None, field: str | None, known: NamedSet) -> Source:
    """A local copy of a named set; of a directory its default split, where names or the set itself tell splits."""
    path = path.resolve()
    if split is not None:
        check_split(name, split, known.splits)
        if not path.is_dir() and not known.holdout and not known.spans:
            raise _no_split(path, split)
    layout = Layout(field or known.field, known.lines, known.keep_newline, any_ending=True)
    files, chosen = find_set(path, split, known, layout)
    size = _size(files)

    def read(position: Position) -> Iterator[Piece]:
        return _read(files, layout, position)

    if known.spans:
        if len(files) != 1:
            raise UserError(f"--source: {path} holds {len(files)} files, but {name} is one; give {name}=FILE")
        chosen = split or next(iter(known.splits))
        layout = Layout(span=known.spans[chosen], any_ending=True)
    elif known.holdout and chosen is None:
        chosen = split or next(iter(known.splits))
        train = chosen == "train"

        def read(position: Position) -> Iterator[Piece]:
            # Two passes, so that no document waits in memory until it is known not to be among the last.
            boundary = sum(count_documents(file, layout) for file in files) - known.holdout
            if boundary <= 0:
                raise UserError(
                    f"--source {name}={path}: {name} keeps its last {known.holdout} documents for validation, but this "
                    f"holds {boundary + known.holdout} in all; give --source {path} to take everything"
                )
            return _part(_read(files, layout, position), boundary, train)

    return Source(name, f"{name}={path}", chosen, known.detokenizer, known.frame, size, read)


def _read(files: list[Path], layout: Layout, position: Position) -> Iterator[Piece]:
    for file in files:
        yield from read_file(file, layout, position)


def _part(pieces: Iterator[Piece], boundary: int, before: bool) -> Iterator[Piece]:
    """The pieces of the first `boundary` documents, or of all after them."""
    seen = 0
    for piece in pieces:
        seen += piece.starts
        if seen > boundary and before:
            return
        if (seen <= boundary) == before:
            yield piece


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _no_split(path: Path, split: str) -> UserError:
    return UserError(f"--split {split}: {path} is one file and has no splits; leave --split out")
