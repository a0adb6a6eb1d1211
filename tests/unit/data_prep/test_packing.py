"""Packing loses and repeats nothing but what the manifest counts as dropped, and knows where documents begin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_ds.data.documents import document_numbers
from data_prep.packing import ALIGNED, BOS_EOS, NO_SPLIT, NONE, WRAP, Chunk, Encoded, Recipe, Tally, pack

BOS, EOS, PAD = 1000, 1001, 1002
Documents = list[list[int]]
documents_strategy = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=40), max_size=12)
cuts_strategy = st.lists(st.integers(0, 500), max_size=6)


def encoded_runs(documents: Documents, cuts: list[int]) -> list[Encoded]:
    """The documents as runs cut anywhere, inside documents too."""
    ids = np.array([token for document in documents for token in document], np.int64)
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths])[:-1] if documents else np.empty(0, np.int64)
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [Encoded(ids[a:b], starts[(starts >= a) & (starts < b)] - a) for a, b in itertools.pairwise(edges)]


def packed(
    documents: Documents, cuts: list[int], length: int, packing: str, frame: str, block_size: int | None = None
) -> tuple[list[Chunk], Tally]:
    tally, recipe = Tally(), Recipe(packing, frame, length, block_size, BOS, EOS, PAD)
    return list(pack(encoded_runs(documents, cuts), recipe, tally)), tally


def numbers(chunks: list[Chunk], length: int, apart: bool = True) -> np.ndarray:
    return document_numbers([c.doc_starts for c in chunks], [c.pad_starts for c in chunks], length, apart)


@given(documents_strategy, cuts_strategy, st.integers(4, 20))
def test_wrap(documents: Documents, cuts: list[int], length: int) -> None:
    chunks, tally = packed(documents, cuts, length, WRAP, NONE)
    stream = [token for document in documents for token in [*document, EOS]]
    kept = [token for chunk in chunks for token in chunk.tokens.tolist()]
    assert kept == stream[: len(stream) // length * length]
    assert tally.tokens == len(stream) == len(kept) + tally.dropped_tokens
    assert tally.dropped_tokens < length and tally.documents == len(documents) and tally.padding == 0
    found = [i * length + s for i, chunk in enumerate(chunks) for s in chunk.doc_starts.tolist()]
    true = [0, *[i + 1 for i, token in enumerate(stream) if token == EOS][:-1]] if stream else []
    assert found == [start for start in true if start < len(kept)]


@given(documents_strategy, cuts_strategy, st.integers(4, 20))
def test_wrap_in_a_frame(documents: Documents, cuts: list[int], length: int) -> None:
    chunks, tally = packed(documents, cuts, length, WRAP, BOS_EOS)
    stream = [token for document in documents for token in document]
    body = length - 2
    assert all(chunk.tokens[0] == BOS and chunk.tokens[-1] == EOS and len(chunk.tokens) == length for chunk in chunks)
    kept = [token for chunk in chunks for token in chunk.tokens[1:-1].tolist()]
    assert kept == stream[: len(stream) // body * body]
    assert tally.tokens == len(stream) == len(kept) + tally.dropped_tokens
    found = [i * body + s - 1 for i, chunk in enumerate(chunks) for s in chunk.doc_starts.tolist()]
    true = np.cumsum([0, *map(len, documents)])[:-1].tolist()
    assert found == [start for start in true if start < len(kept)]


@given(documents_strategy, cuts_strategy, st.integers(1, 6), st.integers(1, 4))
def test_aligned(documents: Documents, cuts: list[int], block: int, blocks: int) -> None:
    """Read back by document numbers, the chunks are the documents, each from a block boundary on."""
    length = block * blocks
    chunks, tally = packed(documents, cuts, length, ALIGNED, NONE, block)
    tokens = np.array([chunk.tokens for chunk in chunks]).reshape(-1)
    if not len(tokens):
        assert tally.tokens == tally.dropped_tokens
        return
    number = numbers(chunks, length)
    assert ((tokens == PAD) == (number.ravel() == -1)).all()  # no document holds a PAD here
    assert (number[:, 0] >= 0).all()
    stream = [token for document in documents for token in [*document, EOS]]
    kept = tokens[tokens != PAD].tolist()
    assert kept == stream[: len(kept)]
    assert tally.tokens == len(stream) == len(kept) + tally.dropped_tokens
    assert tally.padding == int((tokens == PAD).sum()) and tally.documents == len(documents)
    starts = [i * length + s for i, chunk in enumerate(chunks) for s in chunk.doc_starts.tolist()]
    assert all(start % block == 0 for start in starts)
    places = np.flatnonzero(tokens != PAD)
    ends = [i for i in range(len(kept)) if kept[i] == EOS]
    firsts = [0, *[i + 1 for i in ends if i + 1 < len(kept)]]
    assert starts == places[firsts].tolist()
    assert all(gap < block for gap in np.diff(places) - 1)  # no more padding than it takes


@given(documents_strategy, cuts_strategy, st.integers(4, 20), st.sampled_from([NONE, BOS_EOS]))
def test_no_split(documents: Documents, cuts: list[int], length: int, frame: str) -> None:
    chunks, tally = packed(documents, cuts, length, NO_SPLIT, frame)
    assert len(chunks) == len(documents) == tally.documents
    number = numbers(chunks, length)
    dropped = 0
    for chunk, document, own in zip(chunks, documents, number, strict=True):
        if frame == BOS_EOS:
            wanted = [BOS, *document[: length - 2], EOS]
            dropped += max(0, len(document) - (length - 2))
        else:
            wanted = [*document, EOS][:length]
            dropped += max(0, len(document) + 1 - length)
        assert chunk.tokens.tolist() == wanted + [PAD] * (length - len(wanted))
        assert own.tolist() == [1] * len(wanted) + [-1] * (length - len(wanted))
    assert tally.dropped_tokens == dropped
    assert tally.tokens == sum(len(document) + (frame == NONE) for document in documents)
    assert tally.padding == int((number == -1).sum())


@given(documents_strategy, st.integers(1, 4))
def test_documents_of_a_chunk_are_told_apart_exactly(documents: Documents, blocks: int) -> None:
    """A token's number is equal to another's in its chunk where, and only where, both are of one document."""
    length = 5 * blocks
    marked = [[index] * len(document) for index, document in enumerate(documents)]
    for packing, block in ((WRAP, None), (ALIGNED, 5), (NO_SPLIT, None)):
        chunks, _ = packed(marked, [], length, packing, NONE, block)
        number = numbers(chunks, length)
        for chunk, own in zip(chunks, number, strict=True):
            text = np.flatnonzero((chunk.tokens != EOS) & (chunk.tokens != PAD))
            same = chunk.tokens[text][:, None] == chunk.tokens[text][None]
            assert (same == (own[text][:, None] == own[text][None])).all()
        together = numbers(chunks, length, apart=False)
        assert ((together == -1) == (number == -1)).all() and set(together.ravel().tolist()) <= {0, -1}


@pytest.mark.parametrize("packing", [WRAP, ALIGNED, NO_SPLIT])
def test_no_documents(packing: str) -> None:
    assert packed([], [], 8, packing, NONE, 4) == ([], Tally())
