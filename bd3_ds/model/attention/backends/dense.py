"""dense: an explicit softmax in fp32 under the whole mask; the reference for all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_ds.config.registries import ATTENTION, AttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.model.attention.masks import AttentionMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """See `AttentionBackend`."""
    return _softmax(q, k, v, mask.dense)


def _softmax(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    scores = q.float() @ k.float().transpose(-1, -2)  # [B, H, Q, K]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -float("inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


ATTENTION.register("dense", AttentionBackend(attend, planned=_softmax))
