"""Uploading packs to object storage: file by file, the manifest last, as the commit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.errors import UserError
from data_prep.same_pack import check_same

if TYPE_CHECKING:
    from bd3_ds.data.manifest import Manifest

SENT = ".sent"  # in the local copy: the files that have arrived
UNFINISHED = {"format": "unfinished"}  # the manifest while another pack takes its place: refused by readers
TRIES = 5


def already_sent(remote: str, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the pack with these settings is at `remote`; raises UserError for another that may not be replaced."""
    with tempfile.TemporaryDirectory() as nothing:
        _uploader(Path(nothing), remote)  # before any work: does the place exist, and may we write?
    there = remote_manifest(remote)
    if there is None or overwrite:
        return False
    check_same(remote, there, settings)
    print(f"{remote} already holds this pack (hash {there.pack_hash}); nothing to do")
    return True


def remote_manifest(remote: str) -> Manifest | None:
    """The manifest at `remote`, None where there is none; raises UserError where the storage cannot be asked."""
    from bd3_ds.data.manifest import MANIFEST, read_manifest
    from bd3_ds.data.remote import Missing, opener, patiently
    from bd3_ds.runtime.files import read_json

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / MANIFEST
        fetch = opener(remote)
        try:
            patiently(lambda: fetch(MANIFEST, here), f"{remote}/{MANIFEST}", folder)
        except Missing:
            return None
        return None if read_json(here, "remote manifest") == UNFINISHED else read_manifest(folder)


def send(pack: Path, remote: str) -> None:
    """Send the pack's files to `remote`; those that an earlier start has sent are not sent again."""
    from tqdm import tqdm

    from bd3_ds.data.manifest import MANIFEST, read_manifest

    names = sorted(str(path.relative_to(pack)) for path in pack.rglob("*") if path.is_file() and path.name != SENT)
    names.remove(MANIFEST)
    note, head = pack / SENT, f"{remote} {read_manifest(pack).pack_hash}"
    lines = note.read_text().splitlines() if note.is_file() else []
    arrived = set(lines[1:]) if lines[:1] == [head] else set()
    replaces = remote_manifest(remote) is not None
    try:
        if replaces:
            _withdraw(remote)
        uploader = _uploader(pack, remote)
        with open(note, "w") as record:
            record.write("\n".join([head, *sorted(arrived)]) + "\n")
            for name in tqdm([*names, MANIFEST], desc=f"sending to {remote}", unit="file", disable=None):
                if name not in arrived:
                    uploader.upload_file(name)
                    record.write(f"{name}\n")
                    record.flush()
    except UserError:
        raise
    except Exception as error:
        raise _unreachable(remote, error) from None
    note.unlink()


def _withdraw(remote: str) -> None:
    """Make the pack at `remote` no pack, before the first of its files is another one's."""
    from bd3_ds.data.manifest import MANIFEST
    from bd3_ds.runtime.files import write_json

    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / MANIFEST, UNFINISHED)
        _uploader(Path(folder), remote).upload_file(MANIFEST)


def _uploader(folder: Path, remote: str) -> Any:
    from bd3_ds.data.streaming_import import import_streaming

    import_streaming()
    from streaming.base.storage import CloudUploader

    try:
        return CloudUploader.get((str(folder), remote), keep_local=True, retry=TRIES, exist_ok=True)
    except Exception as error:
        raise _unreachable(remote, error) from None


def _unreachable(remote: str, error: Exception) -> UserError:
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"--out {remote}: the storage cannot be reached or refuses ({cause}); check the address, the credentials and "
        "S3_ENDPOINT_URL, and give the same command again: what has arrived is not sent again"
    )
