"""Keys and values of clean tokens, kept from one pass to the next."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per layer, rotated keys and values [B, H, P, d] of the P clean tokens seen so far."""

    def __init__(self, layers: int):
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def __len__(self) -> int:
        first = self._keys[0]
        return 0 if first is None else first.shape[2]

    @property
    def rows(self) -> int:
        """Texts B in the cache, which holds at least one token."""
        assert self._keys[0] is not None
        return len(self._keys[0])

    def joined(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's cached keys and values with fresh ones behind them; the cache stays as it is."""
        past_k, past_v = self._keys[layer], self._values[layer]
        if past_k is None or past_v is None:
            return k, v
        return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Replace the layer's keys and values (as `joined` returned them)."""
        self._keys[layer], self._values[layer] = k, v
