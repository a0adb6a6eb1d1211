"""A block-structured mask cut into rectangles, for attention that works on one rectangle at a time.

Queries come in streams: the noisy tokens of all views, and the clean tokens. A stripe is a run of neighbouring blocks
of a stream; its queries attend to the clean tokens before them and tokens of their own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Queries of a stripe: an eighth of the text within these limits. More make the products faster, fewer waste less on
# hidden pairs, which in short texts are most.
FEWEST_ROWS, ROWS = 64, 128


@dataclass(frozen=True, eq=False)
class Stripe:
    """Queries `rows` of each view of a stream; keys: the first `clean` clean tokens and tokens `own` of their view.

    `bias` [rows, columns] holds 0 and -inf for the last columns, where clean tokens come before own ones; None where
    nothing is masked.
    """

    rows: slice
    clean: int
    own: slice
    bias: Tensor | None
    first: int  # text position of row 0
    own_first: int  # text position of the first own token

    @property
    def columns(self) -> int:
        """Keys of the rectangle, those masked in the last columns included."""
        return self.clean + self.own.stop - self.own.start

    def foreign(self, documents: Tensor) -> Tensor:
        """For one row of documents [L]: True [rows, columns] where the key's is not the query's."""
        rows = documents[self.first : self.first + self.rows.stop - self.rows.start]
        own = documents[self.own_first : self.own_first + self.own.stop - self.own.start]
        return rows[:, None] != torch.cat([documents[: self.clean], own])[None]


@dataclass(frozen=True, eq=False)
class Stream:
    """`views` x T packed queries; `tokens` are the same tokens among the packed keys."""

    noisy: bool
    views: int
    queries: slice
    tokens: slice
    stripes: list[Stripe]


@dataclass(frozen=True, eq=False)
class Layout:
    """The streams of a pass; `clean` are the clean tokens among the packed keys, in the order of the text.

    `full`: nothing is masked. `causal`: exactly the lower triangle.
    """

    streams: list[Stream]
    clean: slice
    full: bool
    causal: bool


def make_layout(
    noisy: int, views: int, clean: int, start: int, past: int, block_size: int, noisy_queries_only: bool
) -> Layout | None:
    """The layout of a pass (`pass_mask`); None where its tokens are not whole blocks or not in one piece."""
    whole = all(count % block_size == 0 for count in (start, past, noisy, clean))
    in_one_piece = not clean or (start == past and not (noisy and past))
    if not whole or not in_one_piece:
        return None
    packed = views * noisy
    streams = []
    if noisy:
        at = slice(past, past + packed)
        streams.append(
            Stream(True, views, slice(0, packed), at, _stripes(start, noisy, block_size, past + clean, True))
        )
    if clean and not (noisy and noisy_queries_only):
        at = slice(past + packed, past + packed + clean)
        stripes = _stripes(start, clean, block_size, past + clean, False)
        streams.append(Stream(False, 1, slice(packed, packed + clean), at, stripes))
    among_keys = slice(packed, packed + clean) if noisy and clean else slice(0, past + clean)
    keys = past + packed + clean
    all_stripes = [stripe for stream in streams for stripe in stream.stripes]
    full = all(stripe.bias is None and stripe.columns == keys for stripe in all_stripes)
    return Layout(streams, among_keys, full, keys == 1 or (block_size == 1 and keys == clean))


def _stripes(first: int, count: int, block_size: int, clean_keys: int, noisy: bool) -> list[Stripe]:
    """Stripes of the queries at text positions first … first + count - 1; long blocks are cut into several."""
    stripes, begin, end = [], first, first + count
    most = min(ROWS, max(FEWEST_ROWS, count // 8))
    whole = most // block_size * block_size
    while begin < end:
        block = begin // block_size * block_size
        stop = min(end, begin + whole) if whole else min(block + block_size, begin + most)
        block_end = -(-stop // block_size) * block_size
        clean = min(clean_keys, block_end - block_size if noisy else block_end)
        own = slice(block - first, block_end - first) if noisy else slice(0, 0)
        bias = None
        if block_end - block > block_size:
            rows = torch.arange(begin, stop)[:, None] // block_size
            near = torch.arange(min(block, clean), clean)[None] // block_size
            hidden = near >= rows if noisy else near > rows
            if noisy:
                hidden = torch.cat([hidden, torch.arange(block, block_end)[None] // block_size != rows], dim=1)
            bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        stripes.append(Stripe(slice(begin - first, stop - first), clean, own, bias, begin, block))
        begin = stop
    return stripes
