"""Files that are whole or absent: write beside, flush to disk, rename."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bd3_ds.runtime.errors import UserError


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one atomic step; readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: its files are private to the owner, and packs and runs are shared.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; floats keep full precision (`repr`)."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read JSON that a user may have damaged; `what` names the file's role in the error.

    A key that stands twice in an object is an error: of Python's reader the last would win, of others the first.
    """
    return parse_json(path, what, lambda text: json.loads(text, object_pairs_hook=unique_keys))


def parse_json(path: Path, what: str, parse: Callable[[str], Any]) -> Any:
    """`read_json` with a reader of its own, which raises ValueError for what it cannot read."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not valid JSON ({error})") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: the object of these pairs; raises ValueError for a key that stands twice."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key '{key}' stands twice in one object; keep one")
        made[key] = value
    return made


@contextmanager
def new_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Build a directory aside and rename it to `path` when the block ends without error.

    An existing `path` is an error unless `replace`; what a killed process left aside is swept by the next one.
    """
    require_writable(path.parent)
    aside = path.parent / f".{path.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync(aside)
        if path.exists():
            if not replace:
                raise UserError(f"{path} already exists")
            shutil.rmtree(path)
        os.replace(aside, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def require_writable(directory: Path) -> None:
    """Prove that a file can be written to `directory`, or that it can be made; leaves nothing behind.

    Raises UserError otherwise.
    """
    place = Path(os.path.abspath(directory))
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".write-test."):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to {directory}: {reason}; choose a directory that you own") from None


def share(path: Path) -> None:
    """Give a file that a library made private (safetensors does) the mode that the umask gives to new files."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    probe.touch()
    shutil.copymode(probe, path)
    probe.unlink()


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()
