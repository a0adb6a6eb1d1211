"""Block-sparse attention by dense matrix products on stripes of the mask, recomputed in the backward pass: for CPUs.

The queries of a stream (noisy or clean) go in stripes of neighbouring blocks. A stripe attends to the clean tokens
before it and its own blocks: a rectangle of scores, of which only the last columns are partly masked. One rectangle at
a time is computed, for a few heads, and recomputed in the backward pass (Dao et al. 2022), so that memory
grows with the length and not with its square.

In bf16, scores and attention weights are rounded to bf16, as in any attention written out in that precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bd3_ds.model.attention.masks import AttentionMask
from bd3_ds.model.attention.stripes import Stream, Stripe

SCORE_BYTES = 16 * 2**20  # scores computed together; they should stay in the CPU's cache


def attend_in_stripes(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q k^T) v for scaled queries [B, H, Q, d], keys and values [B, H, K, d] under a mask of whole blocks."""
    output: Tensor = _StripeAttention.apply(q, k, v, mask)
    return output


class _StripeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v)
        ctx.mask = mask
        output = torch.empty_like(q)
        for work in _rectangles(q, k, v, mask):
            work.put(output, torch.bmm(work.weights(), work.values))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        d_output, d_q = d_output.contiguous(), torch.empty_like(q)
        # Parts from many rectangles are accumulated in fp32. Transposed, because the products are faster so.
        wide = torch.promote_types(q.dtype, torch.float32)
        d_k, d_v = (torch.zeros(*x.shape[:2], x.shape[3], x.shape[2], dtype=wide) for x in (k, v))  # [B, H, d, K]
        for work in _rectangles(q, k, v, ctx.mask):
            weights, above = work.weights(), work.take(d_output)
            work.add(d_v, torch.bmm(above.transpose(1, 2), weights))
            d_weights = torch.bmm(above, work.values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            work.put(d_q, torch.bmm(d_scores, work.keys))
            work.add(d_k, torch.bmm(work.queries.transpose(1, 2), d_scores))
        return d_q, d_k.to(k.dtype).transpose(2, 3), d_v.to(v.dtype).transpose(2, 3), None


@dataclass(frozen=True)
class _Rectangle:
    """A stripe of n heads and K views: queries [n K, rows, d], the keys and values that it attends to [n K, columns,
    d].
    """

    heads: slice  # of all B x H
    stream: Stream
    stripe: Stripe
    clean: slice  # the clean tokens among the packed keys
    queries: Tensor
    keys: Tensor
    values: Tensor
    foreign: Tensor | None  # keys of other documents than the query's, [rows, columns]

    def weights(self) -> Tensor:
        """Attention weights [n K, rows, columns]."""
        scores = torch.bmm(self.queries, self.keys.transpose(1, 2))
        if self.stripe.bias is not None:
            scores[:, :, -self.stripe.bias.shape[1] :] += self.stripe.bias.to(scores.dtype)
        if self.foreign is not None:
            scores.unflatten(0, (-1, self.stream.views)).masked_fill_(self.foreign, -torch.inf)
        return torch.softmax(scores, -1, out=scores)

    def take(self, packed: Tensor) -> Tensor:
        """The stripe's part [n K, rows, d] of a tensor [B, H, Q, d]."""
        return _rows(packed, self.heads, self.stream, self.stripe).flatten(0, 1)

    def put(self, packed: Tensor, part: Tensor) -> None:
        """Write what `take` would read."""
        target = _rows(packed, self.heads, self.stream, self.stripe)
        target.copy_(part.view(target.shape))

    def add(self, gradient: Tensor, part: Tensor) -> None:
        """Add the stripe's part [n K, d, columns] to the transposed gradient [B, H, d, K] of keys or values."""
        gradient = gradient.flatten(0, 1)[self.heads]  # [n, d, K]
        part = part.unflatten(0, (-1, self.stream.views))  # [n, K, d, columns]
        begin = self.clean.start
        for view in part[..., : self.stripe.clean].unbind(1):
            gradient[:, :, begin : begin + self.stripe.clean] += view
        own = gradient[:, :, self.stream.tokens].unflatten(2, (self.stream.views, -1))  # [n, d, K, T]
        own[..., self.stripe.own] += part[..., self.stripe.clean :].transpose(1, 2)


def _rectangles(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Iterator[_Rectangle]:
    layout = mask.layout
    assert layout is not None
    all_heads, per_row = q.shape[0] * q.shape[1], q.shape[1]
    for stream in layout.streams:
        largest = max(stripe.rows.stop - stripe.rows.start for stripe in stream.stripes)
        widest = max(stripe.columns for stripe in stream.stripes)
        at_once = max(1, SCORE_BYTES // (q.element_size() * stream.views * largest * widest))
        if mask.documents is not None:
            at_once = math.gcd(per_row, at_once)  # the heads of one row share its documents
        for first in range(0, all_heads, at_once):
            heads = slice(first, min(first + at_once, all_heads))
            documents = None if mask.documents is None else mask.documents[first // per_row]
            keys, values = (_Columns(x, heads, stream, layout.clean) for x in (k, v))
            for stripe in reversed(stream.stripes):
                yield _Rectangle(
                    heads,
                    stream,
                    stripe,
                    layout.clean,
                    _rows(q, heads, stream, stripe).flatten(0, 1),
                    keys.of(stripe),
                    values.of(stripe),
                    None if documents is None else stripe.foreign(documents),
                )


class _Columns:
    """Keys (or values) of some heads, from which each stripe's are cut, last stripe first.

    A noisy stripe's own keys are written after its clean ones, over clean ones that only the stripes before it used.
    """

    def __init__(self, packed: Tensor, heads: slice, stream: Stream, clean: slice):
        tokens = packed.flatten(0, 1)[heads]  # [n, K, d]
        self._clean = tokens[:, clean]
        self._own: Tensor | None = None
        if stream.noisy:
            self._own = tokens[:, stream.tokens].unflatten(1, (stream.views, -1))  # [n, K, T, d]
            seen = self._clean[:, : max(stripe.clean for stripe in stream.stripes)]
            room = max(stripe.columns for stripe in stream.stripes)
            self._clean = packed.new_empty(len(seen), stream.views, room, seen.shape[-1])
            self._clean[:, :, : seen.shape[1]] = seen[:, None]
            self._clean = self._clean.flatten(0, 1)

    def of(self, stripe: Stripe) -> Tensor:
        """[n K, columns, d]; valid until the next call."""
        if self._own is not None:
            target = self._clean[:, stripe.clean : stripe.columns]
            target.copy_(self._own[:, :, stripe.own].reshape(target.shape))
        return self._clean[:, : stripe.columns]


def _rows(packed: Tensor, heads: slice, stream: Stream, stripe: Stripe) -> Tensor:
    """A view [n, K, rows, d] of the stripe's queries in a contiguous tensor [B, H, Q, d]."""
    tokens = packed.flatten(0, 1)[heads, stream.queries]
    return tokens.unflatten(1, (stream.views, -1))[:, :, stripe.rows]
