"""Tiles of an attention mask: empty, full or partly masked, from ranges of blocks, never from pairs of tokens.

flex_attention skips empty tiles and evaluates the rule only inside partly masked ones. A tile is TILE x TILE pairs.
For each tile of queries and of keys, and each stream in it (a view, or the clean tokens), the first and the last block
say what its pairs can be; so memory goes with the number of tiles, (T / 128)^2, and not with that of pairs.

"Full" is exact. "Not empty" is exact where the tokens of a stream stand in order, as they do in every pass; otherwise
a tile may be taken for partly hidden though it is empty, which costs time and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128  # the default of flex_attention
FAR = 2**40  # beyond every block and document


@dataclass(frozen=True, eq=False)
class Tiles:
    """Boolean [..., tiles of queries, tiles of keys]: some pair may be visible; every pair is."""

    some: Tensor
    every: Tensor

    def within(self, documents: Tiles) -> Tiles:
        """Visible by both rules; leading dimensions are broadcast."""
        return Tiles(self.some & documents.some, self.every & documents.every)

    def ordered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `BlockMask.from_kv_blocks` takes, int32: number [B, 1, q] and indices [B, 1, q, k] of the partly hidden
        tiles of each row, and of the full ones.
        """
        parts = []
        for which in (self.some & ~self.every, self.every):
            which = which.view(-1, 1, *which.shape[-2:])
            order = which.int().argsort(dim=-1, descending=True, stable=True)
            parts += [which.sum(-1, dtype=torch.int32), order.int()]
        return parts[0], parts[1], parts[2], parts[3]


def by_tile(values: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Least and largest of values [..., T] in each tile, [..., tiles]; FAR and -FAR where none is to `keep`."""
    least, largest = values, values
    if keep is not None:
        least, largest = values.where(keep, FAR), values.where(keep, -FAR)
    room = -values.shape[-1] % TILE
    least = torch.nn.functional.pad(least, (0, room), value=FAR)
    largest = torch.nn.functional.pad(largest, (0, room), value=-FAR)
    return least.unflatten(-1, (-1, TILE)).amin(-1), largest.unflatten(-1, (-1, TILE)).amax(-1)


def whole(count: int, device: torch.device) -> Tensor:
    """Which tiles of `count` tokens are not cut off at the end, boolean [tiles]."""
    return torch.arange(1, -(-count // TILE) + 1, device=device) * TILE <= count


def tiles_of_rule(
    q_view: Tensor, q_block: Tensor, k_view: Tensor, k_block: Tensor, views: int, clean_view: int
) -> Tiles:
    """The rule of `masks.py` for queries and keys in `views` noisy views, numbered from 0, and clean ones; each [T]."""
    streams = [clean_view, *range(views)]
    queries = [by_tile(q_block, q_view == stream) for stream in streams]
    keys = [by_tile(k_block, k_view == stream) for stream in streams]
    q_tiles, k_tiles = len(queries[0][0]), len(keys[0][0])
    some = torch.zeros(q_tiles, k_tiles, dtype=torch.bool, device=q_view.device)
    every = torch.ones_like(some)
    for q_stream, (q_first, q_last) in zip(streams, queries, strict=True):
        q_first, q_last = q_first[:, None], q_last[:, None]
        for k_stream, (k_first, k_last) in zip(streams, keys, strict=True):
            absent = (q_first > q_last) | (k_first > k_last)
            seen, all_seen = torch.zeros_like(some), torch.zeros_like(some)
            if q_stream == k_stream:
                seen |= (q_first <= k_last) & (k_first <= q_last)
                all_seen |= (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
            if k_stream == clean_view:
                seen |= k_first < q_last
                all_seen |= k_last <= q_first if q_stream == clean_view else k_last < q_first
            some |= seen & ~absent
            every &= all_seen | absent
    every &= whole(len(q_view), q_view.device)[:, None] & whole(len(k_view), q_view.device)
    return Tiles(some, every)


def tiles_of_documents(queries: Tensor, keys: Tensor) -> Tiles:
    """Pairs of one document, for the documents of queries [B, Q] and keys [B, K]; those below 0 are padding."""
    q_first, q_last = by_tile(queries)
    k_first, k_last = by_tile(keys)
    one = (q_first == q_last)[:, :, None] & (k_first == k_last)[:, None, :]
    every = one & (q_first[:, :, None] == k_first[:, None, :])
    # Padding is handled apart: as the document -1 it would widen the ranges.
    q_text, k_text = (by_tile(part, part >= 0) for part in (queries, keys))
    some = (q_text[0][:, :, None] <= k_text[1][:, None, :]) & (k_text[0][:, None, :] <= q_text[1][:, :, None])
    both_padded = (q_first < 0)[:, :, None] & (k_first < 0)[:, None, :]
    return Tiles(some | both_padded, every)
