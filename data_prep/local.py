"""Sources of local files and directories."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bd3_ds.runtime.errors import UserError
from data_prep.catalog import NamedSet, check_split
from data_prep.files import count_documents, read_file
from data_prep.find import Found, find_files, find_set, no_such_path
from data_prep.formats import Layout, check_ending
from data_prep.packing import NONE
from data_prep.pieces import Piece, Position, Source


def any_text(path: Path, split: str | None, field: str | None) -> Source:
    """A file or directory of text of no known set; without a split all of it."""
    path = own_name(path)
    if split is not None and not path.is_dir():
        raise _no_split(path, split)
    layout = Layout(field or "text")
    found = find_files(path, split, layout)
    return _of_files(str(path), found, split, layout)


def matching(pattern: str, split: str | None, field: str | None) -> Source:
    """The files that a pattern with *, ? or [ matches, `**` at any depth, in the order of their names."""
    if split is not None:
        raise UserError(f"--split {split}: {pattern} names its files itself; leave --split out")
    full = os.path.abspath(pattern)
    matches = sorted(Path(name) for name in glob.glob(full, recursive=True))
    if lost := [path for path in matches if not path.exists()]:
        raise no_such_path(lost[0])
    files = [path for path in matches if path.is_file()]
    layout = Layout(field or "text")
    if "**" not in pattern:  # which matches what is in its directories by itself
        folders = [path for path in matches if path.is_dir()]
        files = sorted([*files, *(file for folder in folders for file in find_files(folder, None, layout).files)])
    if not files:
        raise UserError(f"--source '{pattern}': no file matches it")
    for file in files:
        check_ending(file, layout)
    return _of_files(full, Found(files, []), None, layout)


def _of_files(spec: str, found: Found, split: str | None, layout: Layout) -> Source:
    stem = Path(spec).name.split(".")[0]
    name = re.sub(r"[*?\[\]]+", "", stem).strip("-_") or "text"

    def read(position: Position) -> Iterator[Piece]:
        return _read(found.files, layout, position)

    left_out = tuple(found.left_out)
    return Source(
        name, spec, split, "none", NONE, _size(found.files), read, files=tuple(found.files), left_out=left_out
    )


def named_set(name: str, path: Path, split: str | None, field: str | None, known: NamedSet) -> Source:
    """A local copy of a named set; of a directory its default split, where names or the set itself tell splits."""
    path = own_name(path)
    if split is not None:
        check_split(name, split, known.splits)
        if not path.is_dir() and not known.holdout and not known.spans:
            raise _no_split(path, split)
    layout = Layout(field or known.field, known.lines, known.keep_newline, any_ending=True)
    (files, left_out), chosen = find_set(path, split, known, layout)
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

    source = Source(name, f"{name}={path}", chosen, known.detokenizer, known.frame, size, read)
    return replace(source, files=tuple(files), left_out=tuple(left_out))


def own_name(path: Path) -> Path:
    """`path` in full; a file keeps the name that was given, which tells its format, where that is a link's."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


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
