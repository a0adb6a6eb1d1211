"""Append-only result files, one JSON object a line, that survive a kill in the middle of a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bd3_ds.runtime.files import write_text


def append(path: Path, *records: dict[str, Any]) -> None:
    """Add lines at the end with one write; floats are written with full precision (`repr`)."""
    if not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, b"\n" + data if torn else data)
    finally:
        os.close(handle)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a torn line (a writer killed in the middle of it) is passed over."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of steps later than `step`, which a resumed run is about to write again."""
    if path.exists():
        kept = [record for record in read(path) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
