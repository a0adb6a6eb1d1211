"""Values of the data commands' options, checked before anything slow is loaded."""

from __future__ import annotations

from pathlib import Path

from bd3_ds.runtime.errors import UserError


def whole_number(option: str, text: str, least: int, unit: str = "") -> int:
    """`text` as an integer of at least `least`, or UserError naming `option`."""
    try:
        value = int(text.replace("_", ""))
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(f"{option} {text}: must be a whole number of at least {least}{' ' + unit if unit else ''}")
    return value


def local_directory(option: str, text: str) -> Path:
    """`text` as a path on this machine, or UserError for a remote address or a file in the way."""
    if "://" in text:
        raise UserError(
            f"{option} {text}: packs are written to local directories; give one and copy it there when it is done "
            "(`aws s3 sync DIR s3://...`, `gsutil rsync`)"
        )
    path = Path(text).expanduser()
    if not text or path.is_file():
        raise UserError(f"{option} '{text}': must name a directory" + (", but is a file" if text else ""))
    return path
