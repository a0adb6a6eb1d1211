"""How often each token occurs in a pack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.data.manifest import read_manifest
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np

COUNTS = "token_counts.npy"


def read_token_counts(directory: str | Path) -> np.ndarray:
    """How often each token occurs in a pack's text, int64 [vocabulary]; raises UserError where it has no counts."""
    import numpy as np

    manifest = read_manifest(directory)
    path = Path(directory) / COUNTS
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(
            f"data pack '{directory}' has no readable {COUNTS}, which masking by frequency needs; make the pack again"
        ) from None
    text = manifest.chunks * manifest.length - manifest.padding
    if counts.shape != (manifest.tokenizer.vocab_size,) or int(counts.sum()) != text:
        raise UserError(f"data pack '{directory}' is damaged: {COUNTS} does not fit its manifest; make the pack again")
    return counts.astype("int64")
