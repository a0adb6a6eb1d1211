"""Atomic files: written under a temporary name, flushed to the disk, renamed. Readers see a whole file or none."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bd3_ds.runtime.errors import UserError

LATE = 30.0  # seconds after which a file that one machine wrote is visible on all machines of a file server
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of file systems without fsync for directories


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
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
    content = io.BytesIO()
    for part in json.JSONEncoder(indent=2).iterencode(value):  # `dumps` would hold all parts at once, 5 times the file
        content.write(part.encode())
    content.write(b"\n")
    write_bytes(path, content.getbuffer())


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
    """Build a directory under a temporary name and rename it to `path` when the block ends without error.

    All files are on the disk before it has its name, so that a power cut leaves it whole or absent. An existing `path`
    is an error unless `replace`, and goes only once the new one has its place. What a killed process left is
    removed, or put back, by the next one.
    """
    require_writable(path.parent)
    aside, old = (path.parent / f".{path.name}.{word}" for word in ("partial", "replaced"))
    if old.exists() and not path.exists():
        os.replace(old, path)  # killed between the two renames below
    shutil.rmtree(aside, ignore_errors=True)
    make_directory(aside)
    try:
        yield aside
        sync_tree(aside)
        if path.exists():
            if not replace:
                raise UserError(f"{path} already exists")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        try:
            os.replace(aside, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        sync(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)  # a reader on another machine may hold a file of it


def make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing; once this returns, a power cut does not lose them."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync(place.parent)


def wait_for_file(path: Path, patience: float | None = None) -> bool:
    """Whether a file that another process has written is there; on a network file system it may be visible later.

    `patience`: seconds to wait for it, LATE unless given.
    """
    deadline = time.monotonic() + (LATE if patience is None else patience)
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        with suppress(OSError):
            os.listdir(path.parent)  # has the client ask the server
        time.sleep(0.1)
    return True


def require_writable(directory: Path) -> None:
    """Prove that a file can be written to `directory`, or that it can be made; leaves no file.

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


def apply_umask(path: Path) -> None:
    """Give a file that a library created with mode 0600 (safetensors does) the mode that the umask gives new files."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    probe.touch()
    shutil.copymode(probe, path)
    probe.unlink()


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """`sync` of all files and directories in `directory`, and of itself last."""
    for place, _, files in os.walk(directory, topdown=False):
        for name in files:
            file = Path(place, name)
            if file.is_file():
                sync(file)
        sync(Path(place))


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()
