"""Reading compressed text files as a stream."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path
from typing import BinaryIO

from bd3_ds.runtime.errors import UserError
from data_prep.formats import COMPRESSION, suffixes


def open_text(path: Path, raw: BinaryIO, newline: str | None) -> io.TextIOWrapper:
    """The text of the open file `raw`, by the compression that the name of `path` tells; `newline` as `open` takes it.

    Raises UserError for a zip archive of more than one file.
    """
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
