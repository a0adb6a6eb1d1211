"""Adapters from a network to the callables of the likelihood estimators: one clean pass, then any number of views."""

from __future__ import annotations

from torch import Tensor

from bd3_ds.diffusion.bounds import Answer, ScoredNetwork
from bd3_ds.diffusion.likelihood import Condition, ViewDenoiser
from bd3_ds.model.dit import DiT
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.model.layers import HeadReadout


def conditioned(model: DiT, block_size: int, documents: Tensor | None = None) -> Condition:
    """A Condition on `model`: views of one text share its clean keys and values.

    `documents` [b, L] number each token's document in the texts that the Condition will be given. Of noisy tokens, only
    the blocks from the first to the last that holds a place of `at` go through the network: no other can matter.
    """

    def condition(x0: Tensor) -> ViewDenoiser:
        cache = KVCache(model.network.layers)
        if block_size < x0.shape[1]:
            model.encode(x0, cache, block_size=block_size, documents=documents)

        def denoise(x_t: Tensor, at: Tensor, read: HeadReadout) -> tuple[Tensor, Tensor]:
            length = x_t.shape[-1]
            place = at % length
            start = int(place.min()) // block_size * block_size if len(at) else 0
            stop = (int(place.max()) // block_size + 1) * block_size if len(at) else block_size
            noisy = x_t[..., start:stop].flatten(0, 1)  # [b K, T]
            at = at // length * noisy.shape[1] + place - start
            answer: tuple[Tensor, Tensor] = model.decode(
                noisy, cache, start=start, block_size=block_size, at=at, read=read, documents=documents
            )
            return answer

        return denoise

    return condition


def scored_network(model: DiT, block_size: int, documents: Tensor | None = None) -> ScoredNetwork:
    """`model` as bounds call it, with `documents` [b, L] if tokens see only their own one."""

    def network(x0: Tensor | None) -> Answer:
        if x0 is not None:
            views = conditioned(model, block_size, documents)(x0)
            return lambda tokens, sigma, at, read: views(tokens, at, read)

        def answer(tokens: Tensor, sigma: Tensor | None, at: Tensor, read: HeadReadout) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = model(
                tokens, block_size=block_size, sigma=sigma, at=at, read=read, documents=documents
            )
            return found

        return answer

    return network
