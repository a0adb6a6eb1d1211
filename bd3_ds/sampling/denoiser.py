"""Denoisers for sampling: a prefix of clean tokens, and predictions of the masked block after it.

`CachedDenoiser` and `CausalDenoiser` keep the keys and values of the prefix; `RecomputingDenoiser` keeps its tokens and
runs them again at each evaluation, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_ds.model.dit import DiT
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.sampling.draw import SampledTokens

LOGITS_AT_ONCE = 2**22  # on a CPU; a few fp64 copies of them are held
BYTES_A_LOGIT = 64  # of what is held while tokens are drawn: itself, sums, and for truncation sorted copies, in fp64
SHARE = 0.25  # of a GPU's free memory that they may take

# Tokens sampled from logits [n, V] of the candidates first, first + 1, …
ReadLogits = Callable[[Tensor, int], SampledTokens]


class SamplingDenoiser(Protocol):
    """The clean tokens [N, P] of a window so far, and the network.

    vocab_size: V, [MASK] included. cache_forwards: passes over clean tokens only that one `extend` costs.
    """

    vocab_size: int
    cache_forwards: int
    device: torch.device

    def __len__(self) -> int:
        """P, the clean tokens of each row."""

    def restart(self) -> None:
        """Drop the prefix: a new window begins."""

    def extend(self, tokens: Tensor) -> None:
        """Append clean tokens [N, T], whole blocks, to the prefix."""

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: ReadLogits) -> SampledTokens:
        """`read` applied to the logits at positions `at` [M] of the flattened block [N, S] after the prefix.

        `at` may lie on the host, which then need not wait for a GPU to know whether each row has as many.
        sigma [N] is the noise level, for networks that are conditioned on it.
        """

    def select(self, rows: Tensor) -> None:
        """Keep these rows [R] of the texts."""


class CachedDenoiser:
    """A diffusion network with a KV cache: clean tokens pass through it once, when they are appended."""

    cache_forwards = 1

    def __init__(self, model: DiT, block_size: int):
        self.model = model
        self.block_size = block_size
        self.vocab_size = model.network.vocab_size
        self.device = next(model.parameters()).device
        self.restart()

    def __len__(self) -> int:
        return len(self.cache)

    def restart(self) -> None:
        """See `SamplingDenoiser`."""
        self.cache = KVCache(self.model.network.layers)

    def extend(self, tokens: Tensor) -> None:
        """See `SamplingDenoiser`."""
        self.model.encode(tokens, self.cache, block_size=self.block_size)

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: ReadLogits) -> SampledTokens:
        """See `SamplingDenoiser`."""
        drawn: SampledTokens = self.model.decode(
            block,
            self.cache,
            start=len(self.cache),
            block_size=self.block_size,
            sigma=sigma,
            at=at,
            read=in_chunks(read, self.vocab_size),
        )
        return drawn

    def select(self, rows: Tensor) -> None:
        """See `SamplingDenoiser`."""
        self.cache.select(rows)


class CausalDenoiser(CachedDenoiser):
    """An autoregressive network, in blocks of one: a token is predicted by the pass over the token before it."""

    cache_forwards = 0

    def __init__(self, model: DiT):
        super().__init__(model, block_size=1)

    def __len__(self) -> int:
        return len(self.cache) + sum(part.shape[1] for part in self.fresh)

    def restart(self) -> None:
        """See `SamplingDenoiser`."""
        super().restart()
        self.fresh: list[Tensor] = []

    def extend(self, tokens: Tensor) -> None:
        """See `SamplingDenoiser`. The pass over them is the one that predicts the next token."""
        self.fresh.append(tokens)

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: ReadLogits) -> SampledTokens:
        """See `SamplingDenoiser`."""
        tokens = torch.cat(self.fresh, dim=1)  # [N, T]
        self.fresh = []
        drawn: SampledTokens = self.model.decode(
            tokens,
            self.cache,
            start=len(self.cache),
            block_size=1,
            at=(at + 1) * tokens.shape[1] - 1,
            read=in_chunks(read, self.vocab_size),
        )
        return drawn

    def select(self, rows: Tensor) -> None:
        """See `SamplingDenoiser`."""
        super().select(rows)
        self.fresh = [part[rows] for part in self.fresh]


class RecomputingDenoiser(CachedDenoiser):
    """Any network without a cache, the reference for the others: each evaluation recomputes the prefix."""

    cache_forwards = 0

    def __len__(self) -> int:
        return 0 if self.clean is None else self.clean.shape[1]

    def restart(self) -> None:
        """See `SamplingDenoiser`."""
        self.clean: Tensor | None = None

    def extend(self, tokens: Tensor) -> None:
        """See `SamplingDenoiser`."""
        self.clean = tokens if self.clean is None else torch.cat([self.clean, tokens], dim=1)

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: ReadLogits) -> SampledTokens:
        """See `SamplingDenoiser`."""
        once = CausalDenoiser(self.model) if self.model.network.causal else CachedDenoiser(self.model, self.block_size)
        if self.clean is not None:
            once.extend(self.clean)
        return once.predict(block, at, sigma, read)

    def select(self, rows: Tensor) -> None:
        """See `SamplingDenoiser`."""
        self.clean = None if self.clean is None else self.clean[rows]


def logits_at_once(device: torch.device) -> int:
    """Logits that tokens are sampled from at once: as many as a GPU has room for, few enough for a CPU's cache."""
    if device.type != "cuda":
        return LOGITS_AT_ONCE
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
    return max(LOGITS_AT_ONCE, int(SHARE * (free + kept)) // BYTES_A_LOGIT)


def in_chunks(read: ReadLogits, vocab_size: int) -> Callable[[Tensor, Tensor, Tensor], SampledTokens]:
    """`read` as a network's head takes it (`layers.HeadReadout`), on chunks of logits, so that memory stays small."""

    def read_head(hidden: Tensor, matrix: Tensor, bias: Tensor) -> SampledTokens:
        rows = max(1, logits_at_once(hidden.device) // vocab_size)
        parts = [
            read(F.linear(part, matrix[:vocab_size], bias), index * rows)
            for index, part in enumerate(hidden.split(rows))
        ]
        return parts[0] if len(parts) == 1 else SampledTokens.joined(parts)

    return read_head
