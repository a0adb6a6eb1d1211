"""Reading one text column of CSV and Parquet files."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bd3_ds.runtime.errors import UserError
from data_prep.text_field import no_field, require_once, require_strings
from data_prep.unpacked_text import open_text


def csv_texts(path: Path, raw: BinaryIO, field: str) -> Iterator[str]:
    """The texts in the column `field` of a CSV file, or those of AG News; raises UserError for a short row."""
    csv.field_size_limit(1 << 30)
    with open_text(path, raw, newline="") as stream:
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


def parquet_texts(path: Path, raw: BinaryIO, field: str) -> Iterator[str | None]:
    """The texts in the column `field` of a Parquet file, None for null; raises UserError for a type that is no text."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
    require_strings(str(path), field, file.schema_arrow)
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        yield from batch.column(0).to_pylist()
