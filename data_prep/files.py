"""Text from local files: .txt, .jsonl, .csv (each also .gz, .zst or .zip) and .parquet, in bounded memory."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import shlex
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bd3_ds.runtime.errors import UserError
from data_prep.pieces import Piece, Position, document

TEXT, JSONL, CSV, PARQUET = "text", "jsonl", "csv", "parquet"
FORMATS = {
    ".txt": TEXT,
    ".raw": TEXT,
    ".tokens": TEXT,
    ".md": TEXT,
    ".rst": TEXT,
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".json": JSONL,
    ".csv": CSV,
    ".parquet": PARQUET,
}
COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".zip": "zip"}
MAGIC = {
    ".gz": b"\x1f\x8b",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".zip": b"PK\x03\x04",
    ".parquet": b"PAR1",
    ".xz": b"\xfd7zXZ",
}
PIECE_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Layout:
    """How a set's text lies in its files.

    `field`: key or column of the text. `lines`: in plain text a line is a document, with its end if `keep_newline`,
    else without white space around it. `span`: of plain text only the characters from the first to before the second
    number. `any_ending`: a name without a known ending is plain text.
    """

    field: str = "text"
    lines: bool = False
    keep_newline: bool = False
    span: tuple[int, int] | None = None
    any_ending: bool = False


def suffixes(path: Path) -> tuple[str, str]:
    """The format's ending and the compression's, which may be ""."""
    packed = path.suffix.lower() if path.suffix.lower() in COMPRESSION else ""
    inner = Path(path.stem) if packed else path
    return inner.suffix.lower(), packed


def check_ending(path: Path, layout: Layout) -> str:
    """The format of `path`, or UserError if its name does not tell."""
    suffix = suffixes(path)[0]
    if suffix in FORMATS:
        return FORMATS[suffix]
    if layout.any_ending:
        return TEXT
    raise UserError(
        f"--source: {path} has none of the known endings {', '.join(FORMATS)} (or {', '.join(COMPRESSION)} after it); "
        "rename it"
    )


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
        with _text(path, raw, newline=None) as stream:
            yield from cut(_blocks(path, stream, layout.span))
        return
    texts: Iterable[str | None]
    if kind == TEXT:
        texts = (line if layout.keep_newline else line.strip() for line in _text(path, raw, newline=None))
    else:
        texts = {JSONL: json_texts, CSV: _csv, PARQUET: _parquet}[kind](path, raw, layout.field)
    yield from map(document, texts)


def _text(path: Path, raw: BinaryIO, newline: str | None) -> io.TextIOWrapper:
    packed = suffixes(path)[1]
    stream: BinaryIO = raw
    if packed == ".zip":
        archive = zipfile.ZipFile(raw)
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise UserError(f"--source: {path} holds {len(members)} files; unpack it and give the directory")
        stream = archive.open(members[0])  # type: ignore[assignment]
    elif packed == ".gz":  # all members, zeros after the last passed over as gzip does, EOFError for a cut one
        stream = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
    elif packed:
        import pyarrow

        # Reads through all frames of a file and raises for a cut one, which zstd's tools differ in.
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), COMPRESSION[packed])
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _blocks(path: Path, stream: io.TextIOWrapper, span: tuple[int, int] | None) -> Iterator[str]:
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


def json_texts(path: Path, raw: BinaryIO, field: str) -> Iterator[str | None]:
    """The texts of JSON lines, None for null; raises UserError that names the line for all else."""
    with _text(path, raw, newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            record = _record(path, where, line)
            if field not in record:
                raise no_field(where, field, list(record))
            if isinstance(record, _Twice) and field in record.keys_twice:
                raise UserError(f"--source: {where} has the key '{field}' twice, and only one can be meant; remove one")
            text = record[field]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"--text-field {field}: {where} holds no string there but {_JSON_KINDS[type(text)]}; name the key "
                    "that holds the text, or write it as one string"
                )
            yield text


_JSON_KINDS: dict[type, str] = {
    list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number",
}  # fmt: skip


class _Twice(dict[str, Any]):
    """A JSON object of which some keys were given more than once."""

    keys_twice: frozenset[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        value, seen = _Twice(pairs), Counter(key for key, _ in pairs)
        value.keys_twice = frozenset(key for key, times in seen.items() if times > 1)
    return value


def _record(path: Path, where: str, line: str) -> dict[str, Any]:
    """The object on a line; else UserError with how to get one object a line."""
    begins = line.lstrip()[0]
    shown = shlex.quote(str(path))
    program = "'.[]'" if begins == "[" else "."
    remedy = f"give one object a line, such as `jq -c {program} {shown}` writes"
    try:
        record = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        if begins == "[":
            raise UserError(f"--source: {where} is no JSON object but begins an array; {remedy}") from None
        more = f"; {remedy}" if line.strip() == "{" else ""  # of an object over several lines
        raise UserError(f"--source: {where} is not valid JSON ({error}){more}") from None
    if not isinstance(record, dict):
        kind = "an array" if isinstance(record, list) else "a single value"
        raise UserError(f"--source: {where} is no JSON object but {kind}; {remedy}")
    return record


def _csv(path: Path, raw: BinaryIO, field: str) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    with _text(path, raw, newline="") as stream:
        rows = csv.reader(stream)
        head = next(rows, [])
        if field in head:
            require_once(str(path), field, head)
            column = head.index(field)
            for row in rows:
                if row and len(row) <= column:
                    raise UserError(f"--source: {path} line {rows.line_num} has too few columns for '{field}'")
                yield row[column] if row else ""
        elif len(head) == 3 and head[0].isdigit():  # AG News as published: class, title, description, no header
            for row in itertools.chain([head], rows):
                yield " ".join(row[1:])
        elif head:
            raise no_field(str(path), field, head)


def _parquet(path: Path, raw: BinaryIO, field: str) -> Iterator[str | None]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
    require_strings(str(path), field, file.schema_arrow)
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        yield from batch.column(0).to_pylist()


def require_strings(where: str, field: str, schema: Any) -> None:
    """Raise UserError unless the Arrow `schema` of `where` has one column `field`, and that holds strings (or nulls).

    Other types have no text of their own, only Python's way of writing them.
    """
    import pyarrow

    if field not in schema.names:
        raise no_field(where, field, schema.names)
    require_once(where, field, schema.names)
    kind = schema.field(field).type
    if not _is_string(kind):
        strings = [column.name for column in schema if _is_string(column.type)]
        named = f"name a column of strings ({', '.join(strings[:10])})" if strings else "no other column holds strings"
        binary = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        cast = "cast this one to string if its bytes are UTF-8" if binary else "write this one as strings"
        raise UserError(
            f"--text-field {field}: {where} has the type {kind} there, which is no text; {named}; or {cast}"
        )


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def require_once(where: str, field: str, fields: list[str]) -> None:
    """Raise UserError where `field` is the name of several."""
    if fields.count(field) > 1:
        raise UserError(
            f"--text-field {field}: {where} has {fields.count(field)} columns of this name; rename all but one"
        )


def no_field(where: str, field: str, fields: list[str]) -> UserError:
    """The sentence for a field that `where` lacks."""
    return UserError(
        f"--text-field {field}: {where} has no such field; it has: {', '.join(fields[:10]) or 'no fields at all'}"
    )
