"""The KV cache: keys and values of clean tokens, kept across passes."""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 64  # tokens; what a full buffer grows by at least


class KVCache:
    """Per layer, rotated keys and values [B, H, P, d] of the P clean tokens seen so far.

    They lie in buffers with spare room at the end, where the keys of a pass are written: an evaluation then reads the
    cache without copying it. No gradient flows through a cache.
    """

    def __init__(self, layers: int):
        self._keys: list[Tensor | None] = [None] * layers  # [B, H, room, d]
        self._values: list[Tensor | None] = [None] * layers
        self._tokens = [0] * layers

    def __len__(self) -> int:
        return self._tokens[0]

    @property
    def rows(self) -> int:
        """Texts B in the cache, which holds at least one token."""
        assert self._keys[0] is not None
        return len(self._keys[0])

    def extended(self, layer: int, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """The layer's cached keys and values followed by fresh ones [B, H, T, d]; with `keep`, these stay in the cache.

        The result is valid until the next call for this layer.
        """
        past, fresh = self._tokens[layer], k.shape[2]
        old_k, old_v = self._keys[layer], self._values[layer]
        if not keep and past == 0:  # nothing to append to; the next pass may have another number of rows
            return k, v
        if not keep and fresh > max(past, SPARE):  # many noisy views: room for them would dwarf the cache
            assert old_k is not None and old_v is not None
            return torch.cat([old_k[:, :, :past], k], dim=2), torch.cat([old_v[:, :, :past], v], dim=2)
        keys, values = (self._with_room(old, past, part) for old, part in ((old_k, k), (old_v, v)))
        for buffer, part in ((keys, k), (values, v)):
            buffer[:, :, past : past + fresh] = part.detach()
        self._keys[layer], self._values[layer] = keys, values
        if keep:
            self._tokens[layer] += fresh
        return keys[:, :, : past + fresh], values[:, :, : past + fresh]

    def select(self, rows: Tensor) -> None:
        """Keep these rows [R] of the B texts, in this order."""
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            if keys is not None and values is not None:
                self._keys[layer], self._values[layer] = keys[rows], values[rows]

    @staticmethod
    def _with_room(buffer: Tensor | None, past: int, fresh: Tensor) -> Tensor:
        """A buffer for `past` tokens and the fresh ones, the old one where it suffices."""
        batch, heads, count, width = fresh.shape
        if buffer is not None and buffer.shape[2] >= past + count:
            return buffer
        room = past + count if buffer is None else max(past + count, past + past // 2, past + SPARE)
        larger = fresh.new_empty((batch, heads, room, width))
        if buffer is not None:
            larger[:, :, :past] = buffer[:, :, :past]
        return larger
