"""flex: block-sparse attention of torch's flex_attention, compiled; it has no backward pass on CPUs."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bd3_ds.config.registries import ATTENTION, AttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from bd3_ds.model.attention.masks import AttentionMask

COMPILER = "inductor"  # torch's own
SHAPES = 8  # of passes without gradients that have code for just their lengths
_OWN_CODE: set[Any] = set()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """See `AttentionBackend`.

    Each shape has compiled code of its own; without gradients lengths may be many: only the first few have it.
    """
    import torch

    shapes: Any = (q.shape, k.shape)
    if not torch.is_grad_enabled() and shapes not in _OWN_CODE:
        if len(_OWN_CODE) < SHAPES:
            _OWN_CODE.add(shapes)
        else:
            shapes = None
    compiled = _compiled((q.dtype, q.device, mask.documents is not None, torch.is_grad_enabled(), shapes))
    mixed: Tensor = compiled(q, k, v, mask.flex)
    return mixed


@lru_cache(maxsize=64)
def _compiled(key: tuple[Any, ...]) -> Any:
    """flex_attention compiled for inputs of one kind.

    torch gives up on a piece of code after eight compilations of it and runs it eagerly, which for flex is dense: one
    compiled function for all shapes, types and gradient modes would come to that. So each has a copy of the code.
    """
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    def attend_in_tiles(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask, scale=1.0)

    # torch counts by code object, and two closures of one function share theirs.
    attend_in_tiles.__code__ = attend_in_tiles.__code__.replace()
    return torch.compile(attend_in_tiles, backend=COMPILER, dynamic=key[-1] is None)


ATTENTION.register("flex", AttentionBackend(attend, trains_on=("cuda",)))
