"""The work directory of a preparation: a hidden directory beside the pack that survives a kill, used by one process."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json, require_writable, sync, write_json

_REVISION, _REPLACED = "revision.json", "replaced"


def work_directory_of(out: Path) -> Path:
    """The folder in which the pack `out` is made."""
    return out.parent / f".{out.name}.partial"


@contextmanager
def work_directory(out: Path) -> Iterator[Path]:
    """The work directory of `out`, held against other processes, with all finished files of an earlier start.

    It is removed when the block ends well, and left for the next start when it does not and holds anything finished. An
    old pack that a killed start had taken away, and put none in its place, is back before the block begins.
    """
    require_writable(out.parent)
    work = work_directory_of(out)
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)  # given back when it is closed, also by a kill
    try:
        _hold(handle, work, out)
        try:
            _put_back(work, out)
            for path in list(work.rglob(".*")):  # names that nothing finished has
                _remove(path)
            yield work
            shutil.rmtree(work)
        except BaseException:
            if work.exists() and not any(path.is_file() and path.name != _REVISION for path in work.rglob("*")):
                shutil.rmtree(work)
            raise
    finally:
        os.close(handle)


def _hold(handle: int, work: Path, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.path.samestat(os.fstat(handle), os.stat(work))  # else the other one has just finished
    except OSError:
        free = False
    if not free:
        raise UserError(f"--out {out}: another process is making this pack; wait for it or stop it")


def drop_work_directory(out: Path) -> None:
    """Remove what a start left that was killed when the pack `out` was complete."""
    if work_directory_of(out).exists():
        with work_directory(out):
            pass


def _put_back(work: Path, out: Path) -> None:
    if (work / _REPLACED).exists():
        if out.exists():
            _remove(work / _REPLACED)
        else:
            os.replace(work / _REPLACED, out)


def keep_revision(work: Path, source: str, revision: str | None) -> None:
    """Note which revision of `source` this preparation reads, so that a later start reads it too."""
    if revision is not None:
        write_json(work / _REVISION, {"source": source, "revision": revision})


def revision_begun(out: Path, source: str) -> str | None:
    """The revision of `source` of which the pack `out` was begun; None where none was, or of another source."""
    note = work_directory_of(out) / _REVISION
    begun = read_json(note, "note of a revision") if note.is_file() else {}
    return str(begun["revision"]) if begun.get("source") == source else None


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A new directory that appears as `path`, in place of what is there, when the block ends well."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        _remove(path)
        os.replace(aside, path)
    except BaseException:
        _remove(aside)
        raise


def put_in_place(made: Path, out: Path) -> None:
    """Rename the directory `made` to `out`; what was there goes only once the new one is ready to take its place."""
    old = made.parent / _REPLACED
    if out.exists():
        os.replace(out, old)
    os.replace(made, out)
    sync(out.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
