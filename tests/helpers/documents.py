"""Sequences packed from documents, and what a network says of each document alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.data.documents import document_numbers
from bd3_ds.model.dit import DiT
from data_prep.pack_writer import write_pack
from tests.helpers.tiny import LENGTH, tiny_text, tiny_tokenizer

ALIGNED = [[0, 4, 12], [8], []]  # starts on the block boundaries of L' = 4; an empty row is one document
ANYWHERE = [[0, 5, 6], [3, 14], [15]]
# Objective, block size, starts of three rows for which a document alone has the blocks that it has in its row.
CASES = [(AR, 1, ANYWHERE), (MDLM, LENGTH, ANYWHERE), (SEDD, LENGTH, ANYWHERE), (BD3, 1, ANYWHERE), (BD3, 4, ALIGNED)]


def numbers(starts: list[list[int]], length: int = LENGTH) -> Tensor:
    """Documents [N, length] of rows with these starts."""
    nothing = [np.array([], np.int64)] * len(starts)
    return torch.from_numpy(document_numbers([np.array(row, np.int64) for row in starts], nothing, length))


def each_alone(
    model: DiT, x_t: Tensor, x0: Tensor | None, size: int, starts: list[list[int]], sigma: Tensor | None = None
) -> Tensor:
    """Logits [n, L, V] from one pass for every document, as if it were the whole text, from position 0 on.

    x_t may hold several views of a row, one after the other; a document's single block is as long as the document.
    """
    views = len(x_t) // len(starts)
    rows = []
    for n, noisy in enumerate(x_t):
        edges = sorted({0, *starts[n // views], LENGTH})
        rows.append(
            torch.cat(
                [
                    model(
                        noisy[None, a:b],
                        None if x0 is None else x0[None, n // views, a:b],
                        block_size=min(size, b - a),
                        sigma=None if sigma is None else sigma[n : n + 1],
                    )
                    for a, b in itertools.pairwise(edges)
                ],
                dim=1,
            )
        )
    return torch.cat(rows)


def document_pack(directory: Path, starts: list[list[int]]) -> Path:
    """Chunks of real text, row i with the documents of starts[i]."""
    ids = np.concatenate([np.array(part) for part in tiny_tokenizer().encode_batch(tiny_text()) if part])
    rows = np.resize(ids, (len(starts), LENGTH))
    chunks = ((row, np.array(offsets, np.int64)) for row, offsets in zip(rows, starts, strict=True))
    write_pack(directory, chunks, tiny_tokenizer(), LENGTH, name=directory.name)
    return directory
