"""Who may look at whom. One rule serves every model of the project.

A packed sequence holds noisy tokens (of one or more views) and clean tokens; each token stands in a block. A token sees
  - the clean tokens of earlier blocks,
  - if it is noisy, the noisy tokens of its own view and block, in both directions,
  - if it is clean, the clean tokens of its own block.
With block size 1 and clean tokens alone this is a causal mask (AR); with one block and noisy tokens alone it hides
nothing (MDLM, SEDD); noisy and clean together it is the block-diffusion mask of Arriola et al. 2025, figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

CLEAN = -1


@dataclass(frozen=True, eq=False)
class Places:
    """Where each of T packed tokens stands: its view (CLEAN, or 0 … K-1), position in the text and block, each [T]."""

    view: Tensor
    position: Tensor
    block: Tensor

    def __len__(self) -> int:
        return len(self.view)

    def __add__(self, other: Places) -> Places:
        return Places(
            torch.cat([self.view, other.view]),
            torch.cat([self.position, other.position]),
            torch.cat([self.block, other.block]),
        )


def places(view: int, start: int, count: int, block_size: int, device: torch.device) -> Places:
    """`count` tokens of one view (or CLEAN) from text position `start` on."""
    position = torch.arange(start, start + count, device=device)
    return Places(torch.full_like(position, view), position, position // block_size)


def may_attend(queries: Places, keys: Places) -> Tensor:
    """The rule above as a boolean matrix [Q, K]: True where the query sees the key."""
    q_view, k_view = queries.view[:, None], keys.view[None, :]
    q_block, k_block = queries.block[:, None], keys.block[None, :]
    own_block = (q_view == k_view) & (q_block == k_block)
    earlier_clean = (k_view == CLEAN) & (k_block < q_block)
    return own_block | earlier_clean


class AttentionMask:
    """The rule for fixed places, in the forms that the attention backends want; each is made once."""

    def __init__(self, queries: Places, keys: Places):
        self.queries = queries
        self.keys = keys

    @cached_property
    def dense(self) -> Tensor:
        """Boolean [Q, K]."""
        return may_attend(self.queries, self.keys)

    @cached_property
    def is_full(self) -> bool:
        """Nothing is hidden."""
        return bool(self.dense.all())

    @cached_property
    def is_causal(self) -> bool:
        """The lower triangle, exactly."""
        return len(self.queries) == len(self.keys) and torch.equal(self.dense, torch.ones_like(self.dense).tril())

    @cached_property
    def flex(self) -> object:
        """A BlockMask for flex_attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        q, k = self.queries, self.keys

        def rule(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            own_block = (q.view[i] == k.view[j]) & (q.block[i] == k.block[j])
            return own_block | ((k.view[j] == CLEAN) & (k.block[j] < q.block[i]))

        return create_block_mask(rule, None, None, len(q), len(k), device=str(q.view.device))


@lru_cache(maxsize=64)
def pass_mask(
    noisy: int, clean: int, start: int, past: int, block_size: int, noisy_queries_only: bool, device: torch.device
) -> AttentionMask:
    """The mask of one pass: `noisy` then `clean` tokens from position `start`, behind `past` cached clean tokens."""
    keys = places(CLEAN, 0, past, block_size, device)
    queries = places(0, start, noisy, block_size, device)
    if clean:
        fresh = places(CLEAN, start, clean, block_size, device)
        keys = keys + queries + fresh
        queries = queries if noisy_queries_only else queries + fresh
    else:
        keys = keys + queries
    return AttentionMask(queries, keys)
