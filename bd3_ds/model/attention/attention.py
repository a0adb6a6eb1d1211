"""Scaled dot-product attention under an AttentionMask: one function, the backend chosen by name (`backends/`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bd3_ds.config.registries import ATTENTION, AUTO_ATTENTION
from bd3_ds.model.attention.masks import AttentionMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, backend: str) -> Tensor:
    """Attention output [B, H, Q, d] for queries [B, H, Q, d] and keys and values [B, G, K, d], where G divides H.

    Without a mask all is visible. Queries come scaled: divided by the square root of d. Keys and values of a head
    are those of H / G heads of queries.
    """
    if mask is None:
        chosen = ATTENTION["sdpa"]
    else:
        chosen = ATTENTION[backend_for(backend, q.is_cuda, lambda: not (mask.is_full or mask.is_causal))]
    if q.device.type not in chosen.shares_keys_on:
        k, v = for_each_head(q, k, v)
    mixed: Tensor = chosen.attend(q, k, v, mask)
    return mixed


def backend_for(name: str, cuda: bool, hides: Callable[[], bool]) -> str:
    """The backend that runs where `name` is asked for; `hides`: a mask hides other than nothing or all of the future.

    `auto` is sdpa where it does not, else flex on a GPU and stripes on a CPU (flex has no backward pass there). A
    backend that does not run on this device, as that of an export from elsewhere, is auto here.
    """
    if name != AUTO_ATTENTION and ("cuda" if cuda else "cpu") in ATTENTION[name].runs_on:
        return name
    if not hides():
        return "sdpa"
    return "flex" if cuda else "stripes"


def for_each_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, K, d] for each head of the queries [B, H, Q, d]: [B, H, K, d]."""
    shared = q.shape[1] // k.shape[1]
    return (k, v) if shared == 1 else (k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1))
