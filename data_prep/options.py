"""Parsing and checking of the data commands' options, before anything slow is loaded."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from bd3_ds.runtime.cli import Parser
    from data_prep.pieces import Source

LEAST_LENGTH = 4  # tokens in a chunk
SHOWN = 4  # names in a list of files
REMOTE_SCHEMES = ("s3", "gs", "oci", "azure", "hf")


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
        raise UserError(f"{option} {text}: must be a directory on this machine")
    path = Path(text).expanduser()
    if not text or path.is_file():
        raise UserError(f"{option} '{text}': must name a directory" + (", but is a file" if text else ""))
    return path


def output(out: str, scratch: str | None) -> tuple[Path, str | None]:
    """The directory to make, and the address that it is to be sent to, None where it stays here.

    What goes to one address is always made in one place, so that a preparation that was stopped finds its parts.
    """
    if "://" not in out:
        if scratch is not None:
            raise UserError(f"--scratch {scratch}: is for a remote --out alone; leave it out")
        return local_directory("--out", out), None
    scheme = out.partition("://")[0]
    if scheme not in REMOTE_SCHEMES or not out.partition("://")[2].strip("/"):
        known = ", ".join(f"{name}://" for name in REMOTE_SCHEMES)
        raise UserError(f"--out {out}: must be a directory or an address that begins with one of {known}")
    folder = Path(tempfile.gettempdir()) if scratch is None else local_directory("--scratch", scratch)
    return folder / f"pack-{hashlib.sha256(out.rstrip('/').encode()).hexdigest()[:12]}", out.rstrip("/")


def add_sources(parse: Parser) -> None:
    """Give a command the option --source, which takes several values and may be given several times."""
    parse.add_argument(
        "--source",
        required=True,
        nargs="+",
        action="extend",
        metavar="SOURCE",
        help="named set, NAME=PATH (a named set's local copy), FILE, DIR, 'PATTERN*', OWNER/NAME (hub); several are "
        "read in the order in which they are given",
    )


def say_files(source: Source) -> None:
    """Print which files a source reads and which it does not; nothing for what has no files."""
    if source.files:
        print(f"reads {_counted(source.files)}, {source.size:,} bytes: {_named(source.files)}")
    if source.left_out:
        print(f"leaves out {_counted(source.left_out)}: {_named(source.left_out)}")


def _counted(files: Sequence[Path]) -> str:
    return f"{len(files):,} file{'' if len(files) == 1 else 's'}"


def _named(files: Sequence[Path]) -> str:
    names = [str(file) if i == 0 or file.parent != files[0].parent else file.name for i, file in enumerate(files)]
    more = f" and {len(files) - SHOWN:,} more" if len(files) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
