"""File formats by suffix, and the layout of a set's text in its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bd3_ds.runtime.errors import UserError

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
