"""Sequence parallelism (DeepSpeed Ulysses, Jacobs et al. 2023): S ranks in a row work on the same sequences.

Rank r of S holds text positions r L/S … (r + 1) L/S - 1 of every stream of a pass: of each noisy view and of the clean
tokens. So each rank has the same part of both halves of x_t (+) x_0, whatever the mask costs. All but attention works
on tokens one by one. Two all-to-alls around attention turn "some tokens of all heads" into "all tokens of some heads"
and back, so that attention itself sees the whole mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bd3_ds.model.attention.attention import attend, for_each_head
from bd3_ds.model.attention.masks import AttentionMask, TokenLayout
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.host_to_device import send
from bd3_ds.runtime.world import World


@dataclass(frozen=True)
class Slice:
    """Part `index` of `count` equal parts of each stream's text."""

    index: int
    count: int

    def of(self, packed: Tensor, length: int) -> Tensor:
        """[..., n L] -> [..., n L/S]: this part of each of the n streams of L tokens."""
        return packed.unflatten(-1, (-1, self.count, length // self.count))[..., self.index, :].flatten(-2)

    def local_positions(self, at: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Which of `at` [N], positions in flattened texts [b, L], lie in this part, and where in the flattened [b,
        L/S].

        The first are indices into `at`. Their number depends on values: where `at` lies on a GPU, its host waits.
        """
        part = length // self.count
        row, position = at // length, at % length
        mine = (position // part == self.index).nonzero()[:, 0]
        return mine, (row * part + position % part)[mine]


def by_stream(gathered: Tensor, count: int, part: int) -> Tensor:
    """The tokens [B, S n L/S, …] of S ranks, one after the other, as streams: [B, n L, …]."""
    return gathered.unflatten(1, (count, -1, part)).transpose(1, 2).flatten(1, 3)


def by_rank(packed: Tensor, count: int, part: int) -> Tensor:
    """The way back: streams [B, n L, …] as the tokens of S ranks, one after the other."""
    return packed.unflatten(1, (-1, count, part)).transpose(1, 2).flatten(1, 3)


class SlicedMask(AttentionMask):
    """A rank's slice of the mask of a pass: the layouts are those of its own tokens, `whole` is for attention."""

    def __init__(self, whole: AttentionMask, part: Slice, length: int):
        super().__init__(_sliced(whole.queries, part, length), _sliced(whole.keys, part, length))
        self.whole = whole
        self.part = length // part.count


def _sliced(layout: TokenLayout, part: Slice, length: int) -> TokenLayout:
    return TokenLayout(*(part.of(values, length) for values in (layout.view, layout.position, layout.block)))


class _UlyssesAttention:
    """Replaces `attend` in a layer: all-to-all, attention of some heads over all tokens, all-to-all back."""

    def __init__(self, group: Any, count: int):
        self._count = count
        from deepspeed.sequence.layer import DistributedAttention

        self._ulysses = DistributedAttention(self._attend, group, scatter_idx=2, gather_idx=1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: SlicedMask, backend: str) -> Tensor:
        """q [B, H, Q/S, d], k and v [B, G, T/S, d] -> [B, H, Q/S, d]."""
        k, v = for_each_head(q, k, v)  # there may be fewer of them than ranks
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T/S, H, d]
        mixed: Tensor = self._ulysses(q, k, v, 0, None, mask, backend)
        return mixed.transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: SlicedMask, backend: str) -> Tensor:
        """[B, T, H/S, d], tokens by rank -> the same."""
        q, k, v = (by_stream(x, self._count, mask.part).transpose(1, 2) for x in (q, k, v))
        mixed = attend(q, k, v, mask.whole, backend)  # [B, H/S, Q, d]
        return by_rank(mixed.transpose(1, 2), self._count, mask.part)


class SliceableLoss(Protocol):
    """A head loss that can be computed in parts (`HeadLoss` of `diffusion/chunked_head.py`)."""

    def part(self, rows: Tensor) -> SliceableLoss:
        """The same of `rows` only."""

    def reduce(self, nats: Tensor) -> Tensor:
        """The loss of nats [N]."""


class SequenceParallel:
    """The group of ranks that share this rank's sequences, and their communication."""

    def __init__(self, world: World, count: int):
        """Call on all ranks: each joins the group of its `count` neighbours."""
        groups = [
            torch.distributed.new_group(list(range(first, first + count))) for first in range(0, world.size, count)
        ]
        self.slice = Slice(world.rank % count, count)
        self.group = groups[world.rank // count]

    def apply(self, model: DiT) -> None:
        """Have `model` work on this rank's slice of the tokens, with Ulysses attention; training passes only."""

        def slice_sequence(tokens: Tensor, length: int, *masks: AttentionMask) -> tuple[Any, ...]:
            return self.slice.of(tokens, length), *(SlicedMask(mask, self.slice, length) for mask in masks)

        model.slice_sequence = slice_sequence
        for layer in model.layers:
            layer.attend = _UlyssesAttention(self.group, self.slice.count)  # type: ignore[assignment]

    def denoiser(self, denoise: Any) -> Any:
        """`model.dit.as_denoiser` of a sliced network: the loss and nats of all N positions, on every rank.

        Each rank scores its own positions. The gradient is S times that of its own part of the loss: averaged over all
        ranks of a run, S of which work on one sequence, that is the gradient of the whole loss.
        """
        count, group = self.slice.count, self.group

        def shared(x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor, read: SliceableLoss) -> Any:
            mine, local = (send(part, x_t.device) for part in self.slice.local_positions(at, x_t.shape[1]))
            loss, known = denoise(x_t, x0, sigma=sigma, at=local, read=read.part(mine))
            nats = torch.zeros(len(at), device=known.device, dtype=known.dtype).index_copy_(0, mine, known)
            torch.distributed.all_reduce(nats, group=group)
            return read.reduce(nats) + count * (loss - loss.detach()), nats

        shared.positions_on_host = True  # type: ignore[attr-defined]
        return shared
