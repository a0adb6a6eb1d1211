"""sdpa: torch's fused kernels, under the whole mask where it hides other than nothing or all of the future."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_ds.config.registries import ATTENTION, AttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.model.attention.masks import AttentionMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> Tensor:
    """See `AttentionBackend`; without a mask all is visible."""
    from torch.nn.functional import scaled_dot_product_attention as fused

    shares = k.shape[1] != q.shape[1]
    if mask is None or mask.is_full:
        return fused(q, k, v, scale=1.0, enable_gqa=shares)
    if mask.is_causal:
        return fused(q, k, v, is_causal=True, scale=1.0, enable_gqa=shares)
    return fused(q, k, v, attn_mask=mask.dense, scale=1.0, enable_gqa=shares)


# On CUDA only the flash kernel shares keys, which takes neither fp32 nor a mask; what is left then is the kernel that
# holds all scores. Keys that are repeated have the memory-efficient one.
ATTENTION.register("sdpa", AttentionBackend(attend, shares_keys_on=("cpu",)))
