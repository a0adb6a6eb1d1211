"""The first sequences of a held-out pack, in memory: for validation and the clip search."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bd3_ds.data.pack import Pack


class HeldOut:
    """Tokens of the first `sequences` chunks of a pack, and their documents where there is padding or a document mask.

    `apart`: document numbers are kept, for data.document_mask.
    """

    def __init__(self, pack: Pack, sequences: int, apart: bool):
        self.tokens = torch.from_numpy(pack.all_tokens(sequences))  # [N, L] int64
        documents = pack.all_documents(sequences, apart=apart)
        self.documents = None if documents is None else torch.from_numpy(documents)  # [N, L] int64

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, rows: np.ndarray | slice) -> tuple[Tensor, Tensor | None]:
        """The tokens [n, L] of these sequences, and their documents [n, L] or None."""
        return self.tokens[rows], None if self.documents is None else self.documents[rows]
