"""What a sampler asks of a network: clean tokens to remember, and predictions of masked ones behind them.

`Cached` and `Causal` keep the keys and values of clean tokens; `Recomputing` keeps the tokens and runs all of them at
each evaluation, which must come to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_ds.model.dit import DiT
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.sampling.draw import Drawn

LOGITS_AT_ONCE = 2**22  # on a CPU, of which a few fp64 copies are held
BYTES_A_LOGIT = 64  # of what is held while tokens are drawn: itself, sums, and for truncation sorted copies, in fp64
SHARE = 0.25  # of a GPU's free memory that they may take

# What is drawn from logits [n, V] of the places first, first + 1, … of those that were asked about.
Read = Callable[[Tensor, int], Drawn]


class Denoiser(Protocol):
    """The clean tokens [N, P] of a window so far, and the network.

    vocab_size: V, [MASK] included. cache_forwards: passes over clean tokens alone that one `extend` costs.
    """

    vocab_size: int
    cache_forwards: int
    device: torch.device

    def __len__(self) -> int:
        """P, the clean tokens of each row."""

    def restart(self) -> None:
        """Forget all clean tokens: a new window begins."""

    def extend(self, tokens: Tensor) -> None:
        """Put clean tokens [N, T], whole blocks, behind those that are there."""

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: Read) -> Drawn:
        """What `read` makes of the logits at places `at` [M] of the flattened block [N, S] behind the clean tokens.

        `at` may lie on the host, which then need not wait for a GPU to know whether each row has as many.
        sigma [N] is the noise level, for networks that are conditioned on it.
        """

    def select(self, rows: Tensor) -> None:
        """Keep these rows [R] of the texts."""


class Cached:
    """A diffusion network; clean tokens are run once, when they come."""

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
        """See `Denoiser`."""
        self.cache = KVCache(self.model.network.layers)

    def extend(self, tokens: Tensor) -> None:
        """See `Denoiser`."""
        self.model.encode(tokens, self.cache, block_size=self.block_size)

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: Read) -> Drawn:
        """See `Denoiser`."""
        drawn: Drawn = self.model.decode(
            block,
            self.cache,
            start=len(self.cache),
            block_size=self.block_size,
            sigma=sigma,
            at=at,
            read=in_parts(read, self.vocab_size),
        )
        return drawn

    def select(self, rows: Tensor) -> None:
        """See `Denoiser`."""
        self.cache.select(rows)


class Causal(Cached):
    """An autoregressive network, in blocks of one: a token is predicted by the pass over the token before it."""

    cache_forwards = 0

    def __init__(self, model: DiT):
        super().__init__(model, block_size=1)

    def __len__(self) -> int:
        return len(self.cache) + sum(part.shape[1] for part in self.fresh)

    def restart(self) -> None:
        """See `Denoiser`."""
        super().restart()
        self.fresh: list[Tensor] = []

    def extend(self, tokens: Tensor) -> None:
        """See `Denoiser`. They are run when the next token is asked for."""
        self.fresh.append(tokens)

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: Read) -> Drawn:
        """See `Denoiser`."""
        tokens = torch.cat(self.fresh, dim=1)  # [N, T]
        self.fresh = []
        drawn: Drawn = self.model.decode(
            tokens,
            self.cache,
            start=len(self.cache),
            block_size=1,
            at=(at + 1) * tokens.shape[1] - 1,
            read=in_parts(read, self.vocab_size),
        )
        return drawn

    def select(self, rows: Tensor) -> None:
        """See `Denoiser`."""
        super().select(rows)
        self.fresh = [part[rows] for part in self.fresh]


class Recomputing(Cached):
    """Any network without a cache, the reference for the others: each evaluation runs all clean tokens again."""

    cache_forwards = 0

    def __len__(self) -> int:
        return 0 if self.clean is None else self.clean.shape[1]

    def restart(self) -> None:
        """See `Denoiser`."""
        self.clean: Tensor | None = None

    def extend(self, tokens: Tensor) -> None:
        """See `Denoiser`."""
        self.clean = tokens if self.clean is None else torch.cat([self.clean, tokens], dim=1)

    def predict(self, block: Tensor, at: Tensor, sigma: Tensor | None, read: Read) -> Drawn:
        """See `Denoiser`."""
        once = Causal(self.model) if self.model.network.causal else Cached(self.model, self.block_size)
        if self.clean is not None:
            once.extend(self.clean)
        return once.predict(block, at, sigma, read)

    def select(self, rows: Tensor) -> None:
        """See `Denoiser`."""
        self.clean = None if self.clean is None else self.clean[rows]


def logits_at_once(device: torch.device) -> int:
    """How many logits tokens are drawn from in one go: as many as a GPU has room for, few enough for a CPU's cache."""
    if device.type != "cuda":
        return LOGITS_AT_ONCE
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
    return max(LOGITS_AT_ONCE, int(SHARE * (free + kept)) // BYTES_A_LOGIT)


def in_parts(read: Read, vocab_size: int) -> Callable[[Tensor, Tensor, Tensor], Drawn]:
    """`read` as a network's head takes it (`layers.Read`), on so many logits at once that memory stays small."""

    def read_head(hidden: Tensor, matrix: Tensor, bias: Tensor) -> Drawn:
        rows = max(1, logits_at_once(hidden.device) // vocab_size)
        parts = [
            read(F.linear(part, matrix[:vocab_size], bias), index * rows)
            for index, part in enumerate(hidden.split(rows))
        ]
        return parts[0] if len(parts) == 1 else Drawn.joined(parts)

    return read_head
