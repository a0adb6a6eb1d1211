"""Token frequencies of a pack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from bd3_ds.data.manifest import Manifest

COUNTS = "token_counts.npy"


def read_token_counts(directory: str | Path, manifest: Manifest) -> np.ndarray:
    """How often each token occurs in the text of the pack in `directory`, int64 [vocabulary].

    `manifest` is the pack's. Raises UserError where it has no counts, or others than the manifest says.
    """
    import numpy as np

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
