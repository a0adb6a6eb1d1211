"""A network as the likelihood estimators want it: the clean pass once, then any number of noisy views."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_ds.diffusion.likelihood import Condition, ViewDenoiser
from bd3_ds.model.dit import DiT
from bd3_ds.model.kv_cache import KVCache


def conditioned(model: DiT, block_size: int) -> Condition:
    """A Condition on `model`: views of one text share its clean keys and values."""

    def condition(x0: Tensor) -> ViewDenoiser:
        cache = KVCache(model.network.layers)
        if block_size < x0.shape[1]:
            model.encode(x0, cache, block_size=block_size)

        def denoise(x_t: Tensor, at: Tensor) -> Tensor:
            views = x_t.shape[1]
            wide = cache.repeat(views)
            return model.decode(x_t.flatten(0, 1), wide, start=0, block_size=block_size, at=at.flatten(0, 1))

        return denoise

    return condition


@torch.no_grad()
def causal_logits(model: DiT, x0: Tensor) -> Tensor:
    """Logits [b, L, V] of an AR network."""
    logits: Tensor = model(x0, block_size=1)
    return logits
