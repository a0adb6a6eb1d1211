"""Wrapping: documents of any length become chunks of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NONE, BOS_EOS = "none", "bos-eos"
FRAMES = (NONE, BOS_EOS)


class Encoded(NamedTuple):
    """A run of text tokens; `starts` are the offsets in it at which a document begins, in rising order."""

    ids: np.ndarray
    starts: np.ndarray


class Chunk(NamedTuple):
    """Tokens [L], and the offsets in them at which a document begins."""

    tokens: np.ndarray
    doc_starts: np.ndarray


@dataclass
class Tally:
    """Counts that grow while a stream is read; see `Manifest` for what they mean."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    dropped_tokens: int = 0


def body_length(length: int, frame: str) -> int:
    """Text tokens in a chunk of `length`."""
    return length - 2 if frame == BOS_EOS else length


def wrap(runs: Iterable[Encoded], length: int, frame: str, bos_id: int, eos_id: int, tally: Tally) -> Iterator[Chunk]:
    """Cut the documents in `runs`, laid end to end, into chunks of `length`; what fills no chunk is dropped.

    Frame `none`: an EOS follows each document, a chunk is nothing but this stream. Frame `bos-eos`: no EOS between
    documents, a chunk is BOS, length - 2 tokens of the stream, EOS. Counts documents, tokens and dropped tokens in
    `tally`. Holds one run and less than a chunk in memory.
    """
    body = body_length(length, frame)
    rest = Encoded(np.empty(0, np.int64), np.empty(0, np.int64))
    for run in _separated(runs, eos_id, tally) if frame == NONE else _counted(runs, tally):
        tally.tokens += len(run.ids)
        ids = np.concatenate([rest.ids, run.ids])
        starts = np.concatenate([rest.starts, run.starts + len(rest.ids)])
        whole = len(ids) // body * body
        cuts = np.searchsorted(starts, np.arange(0, whole + 1, body))
        for row, begin in enumerate(range(0, whole, body)):
            tokens, offsets = ids[begin : begin + body], starts[cuts[row] : cuts[row + 1]] - begin
            if frame == BOS_EOS:
                tokens, offsets = np.concatenate([[bos_id], tokens, [eos_id]]), offsets + 1
            yield Chunk(tokens, offsets)
        rest = Encoded(ids[whole:], starts[cuts[-1] :] - whole)
    tally.dropped_tokens += len(rest.ids)


def _counted(runs: Iterable[Encoded], tally: Tally) -> Iterator[Encoded]:
    for run in runs:
        tally.documents += len(run.starts)
        yield run


def _separated(runs: Iterable[Encoded], eos_id: int, tally: Tally) -> Iterator[Encoded]:
    """Put an EOS after each document: before each start but the stream's first, and at the very end."""
    for run in _counted(runs, tally):
        first = tally.documents == len(run.starts)
        places = run.starts[1:] if first else run.starts
        added = np.arange(len(run.starts)) + (0 if first else 1)
        yield Encoded(np.insert(run.ids, places, eos_id), run.starts + added)
    if tally.documents:
        yield Encoded(np.array([eos_id]), np.empty(0, np.int64))
