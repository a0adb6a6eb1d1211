"""Attention masks: which keys each query may attend to. One rule serves every model of the project.

A packed sequence holds noisy tokens (of one or more views) and clean tokens, each in a block. A token attends to
  - the clean tokens of earlier blocks,
  - if it is noisy, the noisy tokens of its own view and block, in both directions,
  - if it is clean, the clean tokens of its own block.
With block size 1 and only clean tokens this is a causal mask (AR); with one block and only noisy tokens it masks
nothing (MDLM, SEDD); noisy and clean together it is the block-diffusion mask of Arriola et al. 2025, figure 2.
Where the text is packed from several documents, the rule can be restricted to each (`restrict_to_documents`).
Padding is then a document like any other, -1: text does not attend to it, and it attends to itself, so that no softmax
is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from bd3_ds.model.attention.stripes import Layout, make_layout
from bd3_ds.model.attention.tiles import TILE, Tiles, tiles_of_documents, tiles_of_rule

CLEAN = -1


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The layout of T packed tokens: view (CLEAN, or 0 … K-1), position in the text and block, each [T]."""

    view: Tensor
    position: Tensor
    block: Tensor

    def __len__(self) -> int:
        return len(self.view)

    def __add__(self, other: TokenLayout) -> TokenLayout:
        return TokenLayout(
            torch.cat([self.view, other.view]),
            torch.cat([self.position, other.position]),
            torch.cat([self.block, other.block]),
        )


def places(view: int, start: int, count: int, block_size: int, device: torch.device) -> TokenLayout:
    """The layout of `count` tokens of one view (or CLEAN) from text position `start` on."""
    position = torch.arange(start, start + count, device=device)
    return TokenLayout(torch.full_like(position, view), position, position // block_size)


def may_attend(queries: TokenLayout, keys: TokenLayout) -> Tensor:
    """The rule above as a boolean matrix [Q, K]: True where the query may attend to the key."""
    q_view, k_view = queries.view[:, None], keys.view[None, :]
    q_block, k_block = queries.block[:, None], keys.block[None, :]
    own_block = (q_view == k_view) & (q_block == k_block)
    earlier_clean = (k_view == CLEAN) & (k_block < q_block)
    return own_block | earlier_clean


class AttentionMask:
    """The rule for given token layouts, in the forms that the attention backends take; each is computed once.

    `documents` [B, L], the document's number at each text position of B rows, masks all other documents as well.
    `layout` is the same mask as rectangles; None where it cannot be cut so.
    """

    def __init__(
        self, queries: TokenLayout, keys: TokenLayout, documents: Tensor | None = None, layout: Layout | None = None
    ):
        self.queries = queries
        self.keys = keys
        self.documents = documents
        self.layout = layout
        self._whole = self  # the rule without documents

    def restrict_to_documents(self, documents: Tensor) -> AttentionMask:
        """The same rule for B rows of documents [B, L]: a token attends only to its own document."""
        narrowed = AttentionMask(self.queries, self.keys, documents, self.layout)
        narrowed._whole = self._whole
        return narrowed

    @cached_property
    def dense(self) -> Tensor:
        """Boolean [Q, K], with documents [B, 1, Q, K]."""
        rule = may_attend(self.queries, self.keys)
        if self.documents is None:
            return rule
        q_document, k_document = self._documents_of(self.documents)
        return (rule & (q_document[:, :, None] == k_document[:, None, :]))[:, None]

    @cached_property
    def is_full(self) -> bool:
        """Whether nothing is masked, in any row."""
        if self.documents is None and self.layout is not None:
            return self.layout.full
        return self.documents is None and bool(self.dense.all())

    @cached_property
    def is_causal(self) -> bool:
        """Whether it is exactly the lower triangle, in every row."""
        if self.documents is not None or len(self.queries) != len(self.keys):
            return False
        if self.layout is not None:
            return self.layout.causal
        return torch.equal(self.dense, torch.ones_like(self.dense).tril())

    @cached_property
    def flex(self) -> object:
        """A BlockMask for flex_attention; its tables are computed from block ranges (`tiles.py`)."""
        from torch.nn.attention.flex_attention import BlockMask

        q, k = self.queries, self.keys

        def rule(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            own_block = (q.view[i] == k.view[j]) & (q.block[i] == k.block[j])
            return own_block | ((k.view[j] == CLEAN) & (k.block[j] < q.block[i]))

        lengths = (len(q), len(k))
        if self.documents is None:
            return BlockMask.from_kv_blocks(*self.tiles.ordered(), TILE, rule, lengths)
        q_document, k_document = self._documents_of(self.documents)

        def rule_within(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return rule(batch, head, i, j) & (q_document[batch, i] == k_document[batch, j])

        return BlockMask.from_kv_blocks(*self.tiles.ordered(), TILE, rule_within, lengths)

    @cached_property
    def tiles(self) -> Tiles:
        """The tiles of the mask; those of the rule are computed once, those of documents for each micro-batch."""
        if self.documents is not None:
            return self._whole.tiles.within(tiles_of_documents(*self._documents_of(self.documents)))
        q, k = self.queries, self.keys
        views = int(torch.cat([q.view, k.view]).max()) + 1  # only CLEAN: 0
        return tiles_of_rule(q.view, q.block, k.view, k.block, views, CLEAN)

    def _documents_of(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """The document's number of each query [B, Q] and key [B, K]."""
        return documents[:, self.queries.position], documents[:, self.keys.position]


@lru_cache(maxsize=64)
def pass_mask(
    noisy: int,
    clean: int,
    start: int,
    past: int,
    block_size: int,
    noisy_queries_only: bool,
    device: torch.device,
    views: int = 1,
) -> AttentionMask:
    """The mask of one pass after `past` cached clean tokens, all from text position `start` on.

    First `views` times `noisy` tokens, then `clean` ones; with `noisy_queries_only` the clean ones are keys only.
    """
    keys = places(CLEAN, 0, past, block_size, device)
    queries = places(0, start, noisy, block_size, device)
    for view in range(1, views):
        queries = queries + places(view, start, noisy, block_size, device)
    if clean:
        fresh = places(CLEAN, start, clean, block_size, device)
        keys = keys + queries + fresh
        queries = queries if noisy_queries_only else queries + fresh
    else:
        keys = keys + queries
    layout = make_layout(noisy, views, clean, start, past, block_size, noisy_queries_only)
    return AttentionMask(queries, keys, layout=layout)
