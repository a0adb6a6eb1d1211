"""Text from local files: .txt, .jsonl, .csv (each also .gz or .zst) and .parquet."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bd3_ds.runtime.errors import UserError

TEXT, JSONL, CSV, PARQUET = "text", "jsonl", "csv", "parquet"
FORMATS = {
    ".txt": TEXT,
    ".raw": TEXT,
    ".tokens": TEXT,
    ".md": TEXT,
    ".rst": TEXT,
    ".jsonl": JSONL,
    ".csv": CSV,
    ".parquet": PARQUET,
}
IN_DIRECTORIES = (".txt", ".raw", ".tokens", ".jsonl", ".csv", ".parquet")  # a folder's README is not its text
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
PIECE_CHARACTERS = 1 << 16


class Piece(NamedTuple):
    """A part of a document; `starts` where it is the document's first."""

    text: str
    starts: bool


def whole(texts: Iterable[str]) -> Iterator[Piece]:
    """Each text a document of one piece; empty texts are left out."""
    return (Piece(text, True) for text in texts if text.strip())


def find_files(path: Path, split: str | None) -> list[Path]:
    """The file `path`, or the text files under the directory `path` in the order of their names.

    With a split only those of which a directory or the file name begins with it. Raises UserError if none is left.
    """
    if not path.exists():
        raise UserError(f"--source: no such file or directory: {path}")
    if not path.is_dir():
        _format(path)
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and _suffixes(file)[0] in IN_DIRECTORIES and not file.name.startswith(".")
    )
    if not found:
        raise UserError(f"--source: the directory {path} holds no {', '.join(IN_DIRECTORIES)} (.gz, .zst) file")
    if split is None:
        return found
    chosen = [file for file in found if any(part.startswith(split) for part in file.relative_to(path).parts)]
    if not chosen:
        raise UserError(f"--split {split}: no name under {path} begins with '{split}'; leave --split out")
    return chosen


def read_file(path: Path, field: str, lines: bool = False, keep_newline: bool = False) -> Iterator[Piece]:
    """The documents in a file. `field` is the key or column of the text; `lines`: in plain text, a line is a document.

    Raises UserError, with the file's name, for damage and for a missing field.
    """
    readers = {JSONL: _jsonl, CSV: _csv, PARQUET: _parquet}
    kind = _format(path)
    try:
        if kind != TEXT:
            yield from whole(readers[kind](path, field))
        elif lines:
            with _open(path, newline=None) as stream:
                yield from whole(line if keep_newline else line.rstrip("\n") for line in stream)
        else:
            with _open(path, newline=None) as stream:
                yield from _cut(stream)
    except UnicodeDecodeError as error:
        raise UserError(f"--source: {path} is not UTF-8 text ({error.reason}); convert it first") from None
    except (OSError, EOFError, csv.Error) as error:
        raise UserError(f"--source: {path} cannot be read ({error})") from None


def _suffixes(path: Path) -> tuple[str, str]:
    """The format's suffix and the compression's, which may be ""."""
    packed = path.suffix.lower() if path.suffix.lower() in COMPRESSION else ""
    inner = Path(path.stem) if packed else path
    return inner.suffix.lower(), packed


def _format(path: Path) -> str:
    suffix = _suffixes(path)[0]
    if suffix not in FORMATS:
        raise UserError(f"--source: {path} has none of the known endings {', '.join(FORMATS)} (or .gz, .zst after it)")
    return FORMATS[suffix]


def _open(path: Path, newline: str | None) -> io.TextIOWrapper:
    import pyarrow

    packed = _suffixes(path)[1]
    stream = pyarrow.input_stream(str(path), compression=COMPRESSION.get(packed))
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _cut(stream: io.TextIOWrapper) -> Iterator[Piece]:
    # Pieces are cut before a line's end: tokenizers that join white space to the word after it then give the same
    # tokens as for the whole file.
    rest, starts = "", True
    while block := stream.read(PIECE_CHARACTERS):
        rest += block
        if len(block) < PIECE_CHARACTERS:
            continue  # the end: nothing to gain from a cut
        cut = max(rest.rfind("\n"), 0) or max(rest.rfind(" "), 0) or len(rest)
        if rest[:cut].strip():
            yield Piece(rest[:cut], starts)
            rest, starts = rest[cut:], False
        elif starts:
            rest = rest[cut:]
    if rest.strip() or (rest and not starts):
        yield Piece(rest, starts)


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with _open(path, newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"--source: {path} line {number} is not valid JSON ({error})") from None
            keys = list(record) if isinstance(record, dict) else []
            if field not in keys:
                raise _no_field(f"{path} line {number}", field, keys)
            if not isinstance(record[field], str):
                raise UserError(f"--text-field {field}: {path} line {number} holds no string there")
            yield record[field]


def _csv(path: Path, field: str) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    with _open(path, newline="") as stream:
        rows = csv.reader(stream)
        head = next(rows, [])
        if field in head:
            column = head.index(field)
            yield from (row[column] for row in rows if len(row) > column)
        elif len(head) == 3 and head[0].isdigit():  # AG News as published: class, title, description, no header
            for row in itertools.chain([head], rows):
                yield " ".join(row[1:])
        elif head:
            raise _no_field(str(path), field, head)


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"--source: {path} is not a Parquet file ({error})") from None
    if field not in file.schema_arrow.names:
        raise _no_field(str(path), field, file.schema_arrow.names)
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)


def _no_field(where: str, field: str, fields: list[str]) -> UserError:
    return UserError(
        f"--text-field {field}: {where} has no such field; it has: {', '.join(fields[:10]) or 'no fields at all'}"
    )
