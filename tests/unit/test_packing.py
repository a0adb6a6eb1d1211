"""Wrapping loses and repeats nothing but the counted remainder, and knows where documents begin."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import BOS_EOS, NONE, Chunk, Encoded, Tally, wrap

BOS, EOS = 1000, 1001
Documents = list[list[int]]
documents_strategy = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=40), max_size=12)


def encoded_runs(documents: Documents, cuts: list[int]) -> list[Encoded]:
    """The documents as runs cut anywhere, inside documents too."""
    ids = np.array([token for document in documents for token in document], np.int64)
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths])[:-1] if documents else np.empty(0, np.int64)
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [Encoded(ids[a:b], starts[(starts >= a) & (starts < b)] - a) for a, b in itertools.pairwise(edges)]


def wrapped(documents: Documents, cuts: list[int], length: int, frame: str) -> tuple[list[Chunk], Tally]:
    tally = Tally()
    return list(wrap(encoded_runs(documents, cuts), length, frame, BOS, EOS, tally)), tally


@given(documents_strategy, st.lists(st.integers(0, 500), max_size=6), st.integers(4, 20))
def test_frame_none(documents: Documents, cuts: list[int], length: int) -> None:
    chunks, tally = wrapped(documents, cuts, length, NONE)
    stream = [token for document in documents for token in [*document, EOS]]
    kept = [token for chunk in chunks for token in chunk.tokens.tolist()]
    assert kept == stream[: len(stream) // length * length]
    assert tally.tokens == len(stream) == len(kept) + tally.dropped_tokens
    assert tally.dropped_tokens < length and tally.documents == len(documents)
    found = [i * length + s for i, chunk in enumerate(chunks) for s in chunk.doc_starts.tolist()]
    true = [0, *[i + 1 for i, token in enumerate(stream) if token == EOS][:-1]] if stream else []
    assert found == [start for start in true if start < len(kept)]


@given(documents_strategy, st.lists(st.integers(0, 500), max_size=6), st.integers(4, 20))
def test_frame_bos_eos(documents: Documents, cuts: list[int], length: int) -> None:
    chunks, tally = wrapped(documents, cuts, length, BOS_EOS)
    stream = [token for document in documents for token in document]
    body = length - 2
    assert all(chunk.tokens[0] == BOS and chunk.tokens[-1] == EOS and len(chunk.tokens) == length for chunk in chunks)
    kept = [token for chunk in chunks for token in chunk.tokens[1:-1].tolist()]
    assert kept == stream[: len(stream) // body * body]
    assert tally.tokens == len(stream) == len(kept) + tally.dropped_tokens
    found = [i * body + s - 1 for i, chunk in enumerate(chunks) for s in chunk.doc_starts.tolist()]
    true = np.cumsum([0, *map(len, documents)])[:-1].tolist()
    assert found == [start for start in true if start < len(kept)]


def test_no_documents() -> None:
    chunks, tally = wrapped([], [], 8, NONE)
    assert chunks == [] and tally == Tally()
