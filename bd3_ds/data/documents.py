"""Document numbers of the tokens of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def read_starts(column: bytes) -> np.ndarray:
    """The offsets that a chunk's column `doc_starts` or `pad_starts` holds, int64 [number of them]."""
    import numpy as np

    return np.frombuffer(column, "<u4").astype("int64")


def document_numbers(
    starts: Sequence[np.ndarray], pads: Sequence[np.ndarray], length: int, apart: bool = True
) -> np.ndarray:
    """Each place's document in its chunk, int64 [N, length], from the `doc_starts` and `pad_starts` of N chunks.

    A token's number is how many documents have begun up to it; 0 is the end of one that an earlier chunk began. Where
    documents are not kept `apart`, all text has the number 0. Padding has -1: it belongs to nobody and is never scored.
    """
    import numpy as np

    begun = np.zeros((len(starts), length), np.int64)
    padded = np.zeros((len(starts), length), bool)
    for row, (offsets, gaps) in enumerate(zip(starts, pads, strict=True)):
        np.add.at(begun[row], offsets, 1)
        for gap in gaps:
            later = offsets[offsets > gap]
            padded[row, gap : later[0] if len(later) else length] = True
    numbers = begun.cumsum(axis=1) if apart else np.zeros_like(begun)
    return np.where(padded, -1, numbers)
