"""The diffusion transformer (Peebles & Xie 2023, as in Sahoo et al. 2024) and, with `causal`, its autoregressive twin.

Written for one device. Three entry points:
  forward   a training pass: noisy tokens beside clean ones, or either of them
  encode    clean tokens into a KVCache
  decode    noisy tokens against a KVCache (or, causal, next tokens)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bd3_ds.model.attention.masks import AttentionMask, pass_mask
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.model.layers import Head, HeadReadout, Layer, TimeEmbedding
from bd3_ds.model.rope import rotary_angles
from bd3_ds.runtime.host_to_device import send


def as_denoiser(network: Callable[..., Any], block_size: int, documents: Tensor | None = None) -> Callable[..., Any]:
    """A DiT, or a wrapper of one, as a `diffusion.objective.Denoiser`: (x_t, x0, sigma=, at=, read=) -> read's
    result.
    """

    def denoise(x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor, read: HeadReadout) -> Any:
        return network(x_t, x0, block_size=block_size, sigma=sigma, at=at, read=read, documents=documents)

    return denoise


class DiT(nn.Module):
    """See the module's docstring; shapes at each method. Returned logits are raw network output."""

    def __init__(self, network: DiTConfig):
        super().__init__()
        self.network = network
        cond_size = None if network.causal else network.cond_size
        self.embed = nn.Embedding(network.vocab_rows, network.hidden_size)
        learned = network.positions == "learned" and network.max_positions
        self.positions = nn.Embedding(learned, network.hidden_size) if learned else None
        self.time = TimeEmbedding(network.cond_size) if cond_size else None
        self.layers = nn.ModuleList(Layer(index, network, cond_size) for index in range(network.layers))
        self.head = Head(network, cond_size)
        if network.tie_embeddings:
            self.head.linear.weight = self.embed.weight
        # (tokens [B, n L], L, masks) -> the slice of tokens and masks of this process; None: all. Set by `parallel`.
        self.slice_sequence: Callable[..., tuple[Any, ...]] | None = None

    def forward(
        self,
        x_t: Tensor,
        x0: Tensor | None = None,
        *,
        block_size: int,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
        read: HeadReadout | None = None,
        documents: Tensor | None = None,
    ) -> Any:
        """Logits [B K, L, V] of the noisy tokens x_t [B K, L], seen with the clean tokens x0 [B, L] of earlier blocks.

        Rows b K … b K + K - 1 of x_t are K views of text b, which share its clean pass. Causal networks take the clean
        tokens as x_t and no x0; a single block (block_size = L) needs no x0 either. sigma [B] is the noise level where
        the network is conditioned on it, else None (zero). With `at` [N], positions in the flattened x_t, the head runs
        only there and [N, V] is returned; with `read` too, its result on the head's input and projection
        (`layers.Head`). `documents` [B, L] numbers each token's document: tokens then attend to their own document
        only.
        """
        clean = x0 if x0 is not None and block_size < x_t.shape[1] and not self.network.causal else None
        return self._run(x_t, clean, block_size=block_size, sigma=sigma, at=at, read=read, documents=documents)

    def encode(self, x0: Tensor, cache: KVCache, *, block_size: int, documents: Tensor | None = None) -> KVCache:
        """Append the clean tokens x0 [B, T], whole blocks, to `cache`; no logits.

        `documents` [B, L] covers the whole text from position 0 on, cached tokens included.
        """
        self._run(None, x0, block_size=block_size, cache=cache, documents=documents)
        return cache

    def decode(
        self,
        tokens: Tensor,
        cache: KVCache,
        *,
        start: int,
        block_size: int,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
        read: HeadReadout | None = None,
        documents: Tensor | None = None,
    ) -> Any:
        """Logits of `tokens` [B K, T] at text positions start, start + 1, …, seen with the cached clean texts [B, …].

        Noisy tokens do not enter the cache; a causal network's tokens are clean and do. `at` and `read` as for
        `forward`, `documents` as for `encode`.
        """
        return self._run(
            tokens,
            None,
            block_size=block_size,
            sigma=sigma,
            at=at,
            read=read,
            cache=cache,
            start=start,
            documents=documents,
        )

    def _run(
        self,
        first: Tensor | None,
        clean: Tensor | None,
        *,
        block_size: int,
        sigma: Tensor | None = None,
        at: Tensor | None = None,
        read: HeadReadout | None = None,
        cache: KVCache | None = None,
        start: int | None = None,
        documents: Tensor | None = None,
    ) -> Any:
        """One pass over `first` (noisy; clean if causal) and `clean` tokens; logits of `first`."""
        past = len(cache) if cache is not None else 0
        if self.network.causal:
            first, clean, block_size = None, first, 1
        noisy_count = 0 if first is None else first.shape[1]
        clean_count = 0 if clean is None else clean.shape[1]
        views = 1
        if first is not None:
            texts = len(clean) if clean is not None else cache.rows if cache is not None and past else len(first)
            views = len(first) // texts
            first = first.reshape(texts, views * noisy_count)  # [B, K T]
            if documents is not None and len(documents) < texts:  # without a clean pass every view is a separate text
                documents = documents.repeat_interleave(texts // len(documents), dim=0)
        tokens = torch.cat([part for part in (first, clean) if part is not None], dim=1)  # [B, K T + T']
        begin = past if start is None else start

        def mask_of(noisy_queries_only: bool) -> AttentionMask:
            mask = pass_mask(
                noisy_count, clean_count, begin, past, block_size, noisy_queries_only, tokens.device, views
            )
            return mask if documents is None else mask.restrict_to_documents(documents)

        mask = mask_of(noisy_queries_only=False)
        final = mask_of(noisy_queries_only=True) if noisy_count and clean_count else mask
        if self.slice_sequence is not None:  # streams have one length in training, the only pass that is sliced
            tokens, mask, final = self.slice_sequence(tokens, noisy_count or clean_count, mask, final)
        position = mask.queries.position
        # Learned positions are added to the tokens; angles of zero then rotate nothing.
        rotary_position = position if self.positions is None else torch.zeros_like(position)
        cos, sin = rotary_angles(rotary_position, self.network.head_width, self.network.rope_base)
        cond = self._condition(sigma, tokens.device)
        update_cache = cache is not None and noisy_count == 0

        x = self.embed(tokens)  # [B, K T + T', D]
        if self.positions is not None:
            x = x + self.positions(position)
        for layer in list(self.layers)[:-1]:
            x = layer(x, cond, cos, sin, mask, cache, update_cache)
        query_index = _query_rows(at, len(x), noisy_count) if views == 1 and final.is_full else None
        query_index = None if query_index is None else send(query_index, x.device)
        at = None if at is None else send(at, x.device)
        x = self.layers[-1](x, cond, cos, sin, final, cache, update_cache, query_index)  # [B, Q, D], only noisy ones
        if query_index is not None:
            at = torch.arange(len(x) * x.shape[1], device=x.device)
        if noisy_count == 0 and not self.network.causal:
            return x
        if views > 1:
            x = x.view(len(x) * views, -1, x.shape[-1])  # [B K, T, D]
        return self.head(x, cond, at, read)

    def _condition(self, sigma: Tensor | None, device: torch.device) -> Tensor | None:
        if self.time is None:
            return None
        sigma = torch.zeros(1, device=device) if sigma is None else sigma
        return torch.nn.functional.silu(self.time(sigma))  # [B or 1, C]


def _query_rows(at: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Positions [N] of flattened noisy rows [B, T] by row, [B, N / B], for a last layer that computes only these
    queries.

    None where all are to be computed: in training, without noisy tokens, and where rows have different numbers of
    positions, or unordered ones. Where they lie on a GPU, its host waits: pass them on the host where they are known.
    """
    if at is None or length == 0 or torch.is_grad_enabled() or len(at) == 0 or len(at) % rows:
        return None
    by_row = at.view(rows, -1) - length * torch.arange(rows, device=at.device)[:, None]
    return by_row if bool(((by_row >= 0) & (by_row < length)).all()) else None
