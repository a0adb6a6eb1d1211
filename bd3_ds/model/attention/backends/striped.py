"""stripes: rectangles of what the mask allows (`stripe_attention.py`); for CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_ds.config.registries import ATTENTION, AttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.model.attention.masks import AttentionMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """See `AttentionBackend`; a mask that cannot be cut is sdpa's."""
    if mask.layout is None:
        from bd3_ds.model.attention.backends.sdpa import attend as attend_in_sdpa

        return attend_in_sdpa(q, k, v, mask)
    from bd3_ds.model.attention.stripe_attention import attend_in_stripes

    return attend_in_stripes(q, k, v, mask)


def planned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `AttentionBackend`."""
    from bd3_ds.model.attention.planned import like_stripes

    return like_stripes(q, k, v)


ATTENTION.register("stripes", AttentionBackend(attend, ("cpu",), ("cpu",), planned=planned))
