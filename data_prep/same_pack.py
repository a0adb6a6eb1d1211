"""Whether a pack that is there already is the one that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    from bd3_ds.data.manifest import Manifest


def check_same(out: str, manifest: Manifest, settings: dict[str, Any]) -> None:
    """Raise UserError unless the pack at `out` was made with these settings."""
    changed = [key for key in settings if manifest.settings.get(key) != settings[key]]
    if changed:
        raise UserError(
            f"--out {out}: holds a pack made with another {', '.join(changed)}; choose another directory or give "
            "--overwrite"
        )
