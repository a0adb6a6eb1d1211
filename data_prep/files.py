"""Text from local files: .txt, .jsonl, .csv (each also .gz, .zst or .zip) and .parquet, in bounded memory."""

from __future__ import annotations

import csv
import shlex
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from bd3_ds.runtime.errors import UserError
from data_prep.formats import CSV, JSONL, MAGIC, PARQUET, TEXT, Layout, check_ending, suffixes
from data_prep.json_lines import json_texts
from data_prep.pieces import Piece, Position, document
from data_prep.plain_text import cut, text_blocks
from data_prep.tables import csv_texts, parquet_texts
from data_prep.unpacked_text import open_text


def count_documents(path: Path, layout: Layout) -> int:
    """Documents in a file, empty ones too; Parquet knows its number, all others are read through."""
    if check_ending(path, layout) == PARQUET:
        import pyarrow.parquet

        with _user_errors(path):
            return int(pyarrow.parquet.read_metadata(path).num_rows)
    return sum(piece.starts for piece in read_file(path, layout, Position()))


def read_file(path: Path, layout: Layout, position: Position) -> Iterator[Piece]:
    """The documents in a file, empty ones and nulls too; adds the file's bytes that were read to `position.done`.

    Raises UserError, with the file's name, for damage, a wrong ending and a missing field.
    """
    kind, before = check_ending(path, layout), position.done
    with _user_errors(path), path.open("rb") as raw:
        _check_content(path, raw)
        for piece in _pieces(path, raw, kind, layout):
            position.done = before + raw.tell()
            yield piece
    position.done = before + path.stat().st_size


class _user_errors:
    """Turns what libraries raise for a damaged file into one sentence that names it."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"--source: {self.path} is not UTF-8 text ({error.reason}); convert it first") from None
        import pyarrow

        known = (OSError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error, pyarrow.ArrowException)
        if isinstance(error, known) and "too much memory" in str(error):  # zstd's word for a window over 128 MiB
            raise UserError(
                f"--source: {self.path} was packed with a longer window than is read here; unpack it with "
                f"`zstd -d --long=31 {shlex.quote(str(self.path))}` and give the result"
            ) from None
        if isinstance(error, known):
            what = f"is not a Parquet file or damaged ({error})" if self.path.suffix == ".parquet" else None
            raise UserError(f"--source: {self.path} {what or f'cannot be read ({error})'}; get it again") from None


def _check_content(path: Path, raw: BinaryIO) -> None:
    head = raw.read(8)
    raw.seek(0)
    suffix, packed = suffixes(path)
    if packed and not head:
        raise UserError(f"--source: {path} is empty, which no {packed} file is; get it again")
    for ending, magic in MAGIC.items():
        if head.startswith(magic) and ending != (packed or suffix):
            remedy = "unpack it first" if ending == ".xz" else f"let its name end in {ending}"
            raise UserError(f"--source: {path} is a {ending} file, which its name does not say; {remedy}")


def _pieces(path: Path, raw: BinaryIO, kind: str, layout: Layout) -> Iterator[Piece]:
    if kind == TEXT and not layout.lines:
        with open_text(path, raw, newline=None) as stream:
            yield from cut(text_blocks(path, stream, layout.span))
        return
    texts: Iterable[str | None]
    if kind == TEXT:
        texts = (line if layout.keep_newline else line.strip() for line in open_text(path, raw, newline=None))
    else:
        texts = {JSONL: json_texts, CSV: csv_texts, PARQUET: parquet_texts}[kind](path, raw, layout.field)
    yield from map(document, texts)
