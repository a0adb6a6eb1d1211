"""Packing: documents of any length into chunks of one length.

wrap      documents end to end, cut every `length` tokens
aligned   the same, but each document starts on a block boundary; the gap before it is padding
no-split  one document a chunk, padded; what does not fit is dropped
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NONE, BOS_EOS = "none", "bos-eos"
FRAMES = (NONE, BOS_EOS)
WRAP, ALIGNED, NO_SPLIT = "wrap", "aligned", "no-split"
PACKINGS = (WRAP, ALIGNED, NO_SPLIT)
_NOTHING = np.empty(0, np.int64)


class Encoded(NamedTuple):
    """A run of text tokens; `starts` are the offsets in it at which a document begins, in rising order."""

    ids: np.ndarray
    starts: np.ndarray


class Chunk(NamedTuple):
    """Tokens [L], and the offsets in them at which a document and at which padding begins."""

    tokens: np.ndarray
    doc_starts: np.ndarray
    pad_starts: np.ndarray = _NOTHING


@dataclass(frozen=True)
class Recipe:
    """How chunks are made: `block_size` is for the packing `aligned`, which knows no frame `bos-eos`."""

    packing: str
    frame: str
    length: int
    block_size: int | None
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass
class Tally:
    """Counts that grow while a stream is read; see `Manifest` for what they mean."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    dropped_tokens: int = 0
    padding: int = 0


class _Laid(NamedTuple):
    """A run of the stream that is cut into chunks, EOS and padding included."""

    ids: np.ndarray
    starts: np.ndarray
    pads: np.ndarray


def pack(runs: Iterable[Encoded], recipe: Recipe, tally: Tally) -> Iterator[Chunk]:
    """Chunks of the documents in `runs`, in their order; counts in `tally`. Holds little more than a run in memory.

    Frame `none`: an EOS follows each document. Frame `bos-eos`: no EOS between documents, a chunk is BOS, text, EOS.
    """
    if recipe.packing == NO_SPLIT:
        return _one_by_one(runs, recipe, tally)
    if recipe.packing == ALIGNED:
        return _cut(_aligned(_counted(runs, tally), recipe, tally), recipe, tally)
    if recipe.frame == NONE:
        return _cut(_separated(_counted(runs, tally), recipe, tally), recipe, tally)
    return _cut(_plain(_counted(runs, tally), tally), recipe, tally)


def _counted(runs: Iterable[Encoded], tally: Tally) -> Iterator[Encoded]:
    for run in runs:
        tally.documents += len(run.starts)
        yield run


def _plain(runs: Iterable[Encoded], tally: Tally) -> Iterator[_Laid]:
    for run in runs:
        tally.tokens += len(run.ids)
        yield _Laid(run.ids, run.starts, _NOTHING)


def _separated(runs: Iterable[Encoded], recipe: Recipe, tally: Tally) -> Iterator[_Laid]:
    """An EOS before each start but the stream's first, and at the very end."""
    for run in runs:
        first = tally.documents == len(run.starts)
        places = run.starts[1:] if first else run.starts
        added = np.arange(len(run.starts)) + (0 if first else 1)
        tally.tokens += len(run.ids) + len(places)
        yield _Laid(np.insert(run.ids, places, recipe.eos_id), run.starts + added, _NOTHING)
    if tally.documents:
        tally.tokens += 1
        yield _Laid(np.array([recipe.eos_id]), _NOTHING, _NOTHING)


def _aligned(runs: Iterable[Encoded], recipe: Recipe, tally: Tally) -> Iterator[_Laid]:
    """EOS and padding up to the next block before each start but the stream's first, EOS at the very end."""
    block = recipe.block_size
    assert block is not None
    offset = 0  # in the stream
    for run in runs:
        first = tally.documents == len(run.starts)
        ends = np.diff(run.starts, prepend=0)  # tokens before each start, since the one before it
        ends[:1] += offset
        gaps = 1 + -(ends + 1) % block  # EOS and padding
        if first:
            gaps[:1] = 0
        values = np.full(int(gaps.sum()), recipe.pad_id)
        values[(np.cumsum(gaps) - gaps)[gaps > 0]] = recipe.eos_id
        starts = run.starts + np.cumsum(gaps)
        pads = (starts - gaps + 1)[gaps > 1]
        ids = np.insert(run.ids, np.repeat(run.starts, gaps), values)
        tally.tokens += len(run.ids) + int((gaps > 0).sum())
        offset += len(ids)
        yield _Laid(ids, starts, pads)
    if tally.documents:
        tally.tokens += 1
        yield _Laid(np.array([recipe.eos_id]), _NOTHING, _NOTHING)


def _cut(runs: Iterable[_Laid], recipe: Recipe, tally: Tally) -> Iterator[Chunk]:
    """Chunks of the stream; what fills no chunk at the end is dropped."""
    body = recipe.length - 2 if recipe.frame == BOS_EOS else recipe.length
    rest = _Laid(_NOTHING, _NOTHING, _NOTHING)
    for run in runs:
        carried = len(rest.ids)
        ids = np.concatenate([rest.ids, run.ids])
        starts = np.concatenate([rest.starts, run.starts + carried])
        pads = np.concatenate([rest.pads, run.pads + carried])
        whole = len(ids) // body * body
        edges = np.arange(0, whole + 1, body)
        cuts, pad_cuts = np.searchsorted(starts, edges), np.searchsorted(pads, edges)
        for row, begin in enumerate(range(0, whole, body)):
            tokens, offsets = ids[begin : begin + body], starts[cuts[row] : cuts[row + 1]] - begin
            gaps = pads[pad_cuts[row] : pad_cuts[row + 1]] - begin
            if recipe.frame == BOS_EOS:
                tokens, offsets = np.concatenate([[recipe.bos_id], tokens, [recipe.eos_id]]), offsets + 1
            tally.padding += padded_places(offsets, gaps, len(tokens))
            yield Chunk(tokens, offsets, gaps)
        rest = _Laid(ids[whole:], starts[cuts[-1] :] - whole, pads[pad_cuts[-1] :] - whole)
    tally.dropped_tokens += len(rest.ids) - padded_places(rest.starts, rest.pads, len(rest.ids))


def padded_places(starts: np.ndarray, pads: np.ndarray, length: int) -> int:
    """How many places are padding: each gap lasts to the next document or to the end."""
    if not len(pads):
        return 0
    ends = np.append(starts, length)[np.searchsorted(starts, pads)]
    return int((ends - pads).sum())


def _one_by_one(runs: Iterable[Encoded], recipe: Recipe, tally: Tally) -> Iterator[Chunk]:
    framed = recipe.frame == BOS_EOS
    room = recipe.length - 1 if framed else recipe.length  # for the document and its EOS

    def close(document: list[np.ndarray], size: int) -> Chunk:
        # Frame none: the EOS is a token of the text, and goes where the document leaves no room for it.
        text = np.concatenate(document)
        text = np.append(text[: room - 1], recipe.eos_id) if framed or size < room else text[:room]
        tally.tokens += size if framed else size + 1
        tally.dropped_tokens += (size if framed else size + 1) - (len(text) - 1 if framed else len(text))
        used = len(text) + framed
        tally.padding += recipe.length - used
        tokens = np.full(recipe.length, recipe.pad_id)
        tokens[:used] = np.append(recipe.bos_id, text) if framed else text
        return Chunk(tokens, np.array([0]), np.array([used] if used < recipe.length else [], np.int64))

    document: list[np.ndarray] = []
    size, kept = 0, 0
    for run in _counted(runs, tally):
        edges = [0, *run.starts.tolist(), len(run.ids)]
        for number, (begin, end) in enumerate(itertools.pairwise(edges)):
            if number and document:
                yield close(document, size)
            if number:
                document, size, kept = [], 0, 0
            if kept < room and end > begin:  # of a longer document no more than this is held
                document.append(run.ids[begin : min(end, begin + room)])
                kept += end - begin
            size += end - begin
    if document:
        yield close(document, size)
