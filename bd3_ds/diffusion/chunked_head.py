"""A fused linear and loss layer: chunked over tokens, so that the logits [N, V] of all tokens are never stored.

Logits of a chunk of tokens are made, turned into nats and gradients, and dropped: three matrix products where autograd
on whole logits has three as well, and memory for one chunk. Gradients are ready after the forward pass, since the
weight of each token in the loss is known before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 128 * 2**20  # logits of a chunk
CACHED_BYTES = 16 * 2**20  # on CPUs, fp32 rows of it that are processed together: they stay in the cache


@dataclass(frozen=True, eq=False)
class HeadLoss(ABC):
    """A loss on a network's head: (sum of weight x nats, nats [N] without gradient), both fp32.

    targets [N]: clean tokens at the positions of the hidden states. `weight` [N] is each token's in the loss; None
    where no gradient is wanted (the sum is then plain).
    """

    targets: Tensor
    mask_id: int
    weight: Tensor | None = None

    def __call__(self, hidden: Tensor, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """From hidden states [N, D] and the projection to the vocabulary, matrix [V or more, D] and bias [V].

        Further rows of the matrix pad it for GPUs; their logits are computed and dropped.
        """
        if self.weight is None or not torch.is_grad_enabled():
            nats = _nats(hidden, matrix, bias, self)
            return self.reduce(nats), nats
        total, nats = _ChunkedLoss.apply(hidden, matrix, bias, self.weight, self)
        return total, nats

    def of_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same from logits [N, V]."""
        nats = self.nats(logits.float())
        return self.reduce(nats), nats.detach()

    def part(self, rows: Tensor) -> HeadLoss:
        """The same for `rows` [n] of the tokens only."""
        whole = {field.name: getattr(self, field.name) for field in fields(self)}
        selected: dict[str, Any] = {name: value[rows] for name, value in whole.items() if isinstance(value, Tensor)}
        return replace(self, **selected)

    def reduce(self, nats: Tensor) -> Tensor:
        """The loss of nats [N]."""
        return (nats if self.weight is None else self.weight * nats).sum()

    @abstractmethod
    def nats(self, logits: Tensor) -> Tensor:
        """Nats [N] of logits [N, V] in fp32, differentiable."""

    @abstractmethod
    def loss_and_grad(self, logits: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """Nats [n] and, with `with_gradient`, d nats / d logits [n, V] of the tokens `rows` of all N.

        logits [n, V] in fp32 may be overwritten.
        """


def _bytes_at_once(device: torch.device) -> int:
    """A GPU has no such cache, and many small kernels would be bound by their launches."""
    return CACHED_BYTES if device.type == "cpu" else 2 * CHUNK_BYTES


def _chunks(count: int, width: int, item: int, limit: int) -> list[slice]:
    rows = max(1, limit // (width * item))
    return [slice(first, min(first + rows, count)) for first in range(0, count, rows)]


@torch.no_grad()
def _nats(hidden: Tensor, matrix: Tensor, bias: Tensor, loss: HeadLoss) -> Tensor:
    nats = torch.empty(len(hidden), device=hidden.device)
    for rows in _chunks(len(hidden), len(matrix), 4, 2 * _bytes_at_once(hidden.device)):
        logits = F.linear(hidden[rows], matrix)[:, : len(bias)].float().add_(bias)
        nats[rows] = loss.loss_and_grad(logits, rows, False)[0]
    return nats


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor, weight: Tensor, loss: HeadLoss
    ) -> tuple[Tensor, Tensor]:
        nats = torch.empty(len(hidden), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_matrix: Tensor | None = None
        vocab = len(bias)
        d_bias = torch.zeros(bias.shape, device=bias.device)
        for chunk in _chunks(len(hidden), len(matrix), hidden.element_size(), CHUNK_BYTES):
            part, scale = hidden[chunk], weight[chunk, None]
            # Logits, then row by row d nats / d logits; the bias is added while they are in the cache.
            grad_logits = F.linear(part, matrix)  # [n, V or more]
            grad_logits[:, vocab:] = 0
            for rows in _chunks(len(part), len(matrix), 4, _bytes_at_once(hidden.device)):
                span = slice(chunk.start + rows.start, chunk.start + rows.stop)
                nats[span], grad = loss.loss_and_grad(grad_logits[rows, :vocab].float().add_(bias), span, True)
                grad_logits[rows, :vocab] = grad
            dtype = grad_logits.dtype
            d_hidden[chunk] = (grad_logits @ matrix.to(dtype)) * scale
            weighted = (part * scale).to(dtype)
            if d_matrix is None:
                d_matrix = grad_logits.t() @ weighted
            elif d_matrix.dtype == dtype == torch.float32:
                d_matrix.addmm_(grad_logits.t(), weighted)
            else:  # several parts are added up in fp32
                d_matrix = d_matrix.float().add_(grad_logits.t() @ weighted)
            d_bias += (scale[:, 0].to(dtype) @ grad_logits)[:vocab]
        d_matrix = torch.zeros_like(matrix) if d_matrix is None else d_matrix.to(matrix.dtype)
        ctx.save_for_backward(d_hidden, d_matrix, d_bias.to(bias.dtype))
        ctx.mark_non_differentiable(nats)
        return (weight * nats).sum(), nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        d_hidden, d_matrix, d_bias = ctx.saved_tensors
        return d_hidden * grad_loss, d_matrix * grad_loss, d_bias * grad_loss, None, None
