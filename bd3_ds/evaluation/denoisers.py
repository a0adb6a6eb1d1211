"""A network as the likelihood estimators want it: the clean pass once, then any number of noisy views."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_ds.diffusion.likelihood import Condition, ViewDenoiser
from bd3_ds.model.dit import DiT
from bd3_ds.model.kv_cache import KVCache


def conditioned(model: DiT, block_size: int, documents: Tensor | None = None) -> Condition:
    """A Condition on `model`: views of one text share its clean keys and values.

    `documents` [b, L] number each token's document in the texts that the Condition will be given.
    """

    def condition(x0: Tensor) -> ViewDenoiser:
        cache = KVCache(model.network.layers)
        if block_size < x0.shape[1]:
            model.encode(x0, cache, block_size=block_size, documents=documents)

        def denoise(x_t: Tensor, at: Tensor) -> Tensor:
            views = x_t.shape[1]
            return model.decode(
                x_t.flatten(0, 1),
                cache.repeat(views),
                start=0,
                block_size=block_size,
                at=at.flatten(0, 1),
                documents=for_views(documents, views),
            )

        return denoise

    return condition


def for_views(documents: Tensor | None, views: int) -> Tensor | None:
    """Each row of documents [b, L] `views` times over, [b views, L], as the views of a text lie in a pass."""
    return None if documents is None else documents.repeat_interleave(views, dim=0)


@torch.no_grad()
def causal_logits(model: DiT, x0: Tensor, documents: Tensor | None = None) -> Tensor:
    """Logits [b, L, V] of an AR network; `documents` [b, L] where tokens see their own document alone."""
    logits: Tensor = model(x0, block_size=1, documents=documents)
    return logits
