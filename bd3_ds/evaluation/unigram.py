"""The unigram baseline: the perplexity of token frequencies in the training pack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bd3_ds.data.documents import document_numbers
from bd3_ds.data.manifest import check_same_tokenizer, read_manifest
from bd3_ds.data.pack import Pack, open_pack
from bd3_ds.data.token_counts import read_token_counts


def unigram_perplexity(train_pack: str | Path, eval_pack: str | Path, max_chunks: int | None = None) -> float:
    """Perplexity of the evaluation pack's scored tokens under add-one-smoothed counts of the training pack's text.

    The same tokens are scored as by every model here: all but a chunk's first and padding; [MASK] has probability 0.
    `max_chunks` bounds the evaluation chunks, as it does for the models. Of the training pack only the facts are read.
    Raises UserError for different tokenizers.
    """
    train, evaluation = read_manifest(train_pack), open_pack(eval_pack)
    check_same_tokenizer(train, evaluation.manifest)
    vocabulary = train.tokenizer.vocab_size
    seen = read_token_counts(train_pack, train) + 1.0
    seen[train.tokenizer.mask_id] = 0
    scored = _counts(evaluation, vocabulary, max_chunks)
    present = scored > 0
    nats = -(scored[present] * np.log(seen[present] / seen.sum())).sum() / scored.sum()
    return math.exp(nats)


def _counts(pack: Pack, vocabulary: int, limit: int | None) -> np.ndarray:
    """How often each token is scored in the first `limit` chunks, fp64 [V]."""
    total = np.zeros(vocabulary)
    for rows in _scored(pack, limit):
        total += np.bincount(rows, minlength=vocabulary)
    return total


def _scored(pack: Pack, limit: int | None, together: int = 1024) -> Iterator[np.ndarray]:
    """The scored tokens of `together` chunks, [N]."""
    count = len(pack) if limit is None else min(limit, len(pack))
    for start in range(0, count, together):
        rows = range(start, min(start + together, count))
        starts, pads = [pack.doc_starts(i) for i in rows], [pack.pad_starts(i) for i in rows]
        text = document_numbers(starts, pads, pack.manifest.length) >= 0
        yield np.stack([pack.tokens(i) for i in rows])[:, 1:][text[:, 1:]]
