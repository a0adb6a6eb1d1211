"""Whether an existing pack is the one that would be made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from bd3_ds.data.manifest import Manifest


def already_there(out: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` is this very pack; raises UserError for anything else there that may not be replaced."""
    from bd3_ds.data.manifest import MANIFEST, read_manifest
    from bd3_ds.data.shards import read_index
    from bd3_ds.runtime.files import require_writable
    from data_prep.work_directory import drop_work_directory

    if os.path.ismount(out) or out.name in ("", ".."):
        raise UserError(f"--out {out}: a pack takes the place of its directory, which cannot be; name one inside it")
    require_writable(out.parent)
    if not out.exists():
        return False
    if not (out / MANIFEST).is_file():
        if any(out.iterdir()):
            raise UserError(f"--out {out}: exists and is not a data pack, so it is never overwritten; choose another")
        return False
    if overwrite:
        return False
    check_same(str(out), read_manifest(out), settings)
    read_index(out)
    drop_work_directory(out)
    print(f"{out} already holds this pack; nothing to do")
    return True


def made_before(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the scratch place `out` holds this pack, made by a start that was stopped before all of it was sent."""
    from bd3_ds.data.manifest import MANIFEST, read_manifest

    return (out / MANIFEST).is_file() and read_manifest(out).settings == settings


def check_same(out: str, manifest: Manifest, settings: dict[str, Any]) -> None:
    """Raise UserError unless the pack at `out` was made with these settings."""
    changed = [key for key in settings if manifest.settings.get(key) != settings[key]]
    if changed:
        raise UserError(
            f"--out {out}: holds a pack made with another {', '.join(changed)}; choose another directory or give "
            "--overwrite"
        )
