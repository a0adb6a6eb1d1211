"""Values of the data commands' options, checked before anything slow is loaded."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from bd3_ds.runtime.errors import UserError

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
