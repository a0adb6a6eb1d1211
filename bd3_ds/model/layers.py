"""The parts of the network: norm, time conditioning, one transformer layer, the head.

Letters in shape comments: B batch, T packed tokens, D width, H heads, d head width, C conditioning width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_ds.model.attention import attend
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.model.masks import AttentionMask
from bd3_ds.model.rope import rotate


class Norm(nn.Module):
    """LayerNorm without bias, computed in fp32 whatever the dtype of its input."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight.float(), None, 1e-5).to(x.dtype)


class TimeEmbedding(nn.Module):
    """The noise level sigma [B] as a vector [B, C]: sinusoids, then an MLP."""

    FREQUENCIES = 128

    def __init__(self, cond_size: int):
        super().__init__()
        self.expand = nn.Linear(2 * self.FREQUENCIES, cond_size)
        self.mix = nn.Linear(cond_size, cond_size)

    def forward(self, sigma: Tensor) -> Tensor:
        ladder = torch.arange(self.FREQUENCIES, device=sigma.device, dtype=torch.float32) / self.FREQUENCIES
        angle = sigma.float()[:, None] * torch.exp(-math.log(10_000.0) * ladder)  # [B, 128]
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.expand.weight.dtype)
        return self.mix(F.silu(self.expand(waves)))


class Layer(nn.Module):
    """Attention and MLP with residuals; with `cond_size`, scaled, shifted and gated by the conditioning (adaLN)."""

    def __init__(
        self, index: int, width: int, heads: int, mlp_ratio: int, cond_size: int | None, dropout: float, backend: str
    ):
        super().__init__()
        self.index = index
        self.heads = heads
        self.dropout = dropout
        self.backend = backend
        self.norm_attention = Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = Norm(width)
        self.up = nn.Linear(width, mlp_ratio * width)
        self.down = nn.Linear(mlp_ratio * width, width)
        self.modulation = nn.Linear(cond_size, 6 * width) if cond_size else None

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask,
        cache: KVCache | None = None,
        grow: bool = False,
    ) -> Tensor:
        """x [B, T, D] -> [B, Q, D], where Q = queries of the mask, the first Q of the T tokens.

        With a `cache`, the tokens also see what it holds; with `grow`, it then holds them too.
        """
        if self.modulation is None or cond is None:
            attended = self._attention(self.norm_attention(x), cos, sin, mask, cache, grow)
            x = x[:, : attended.shape[1]] + F.dropout(attended, self.dropout, self.training)
            return x + F.dropout(self._mlp(self.norm_mlp(x)), self.dropout, self.training)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond)[:, None].chunk(
            6, dim=-1
        )  # [B, 1, D]
        attended = self._attention(self.norm_attention(x) * (1 + scale_a) + shift_a, cos, sin, mask, cache, grow)
        x = x[:, : attended.shape[1]] + gate_a * F.dropout(attended, self.dropout, self.training)
        mixed = self._mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m)
        return x + gate_m * F.dropout(mixed, self.dropout, self.training)

    def _attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, cache: KVCache | None, grow: bool
    ) -> Tensor:
        batch, tokens, width = x.shape
        queries = len(mask.queries)
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, d]
        q = rotate(q[:, :, :queries], cos[:queries], sin[:queries])
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.joined(self.index, k, v)
            if grow:
                cache.store(self.index, k, v)
        mixed = attend(q, k, v, mask, self.backend)  # [B, H, Q, d]
        return self.out(mixed.transpose(1, 2).reshape(batch, queries, width))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Head(nn.Module):
    """Final norm and the projection to the vocabulary, [N, D] or [B, T, D] -> [..., V]."""

    def __init__(self, width: int, vocab_size: int, cond_size: int | None):
        super().__init__()
        self.norm = Norm(width)
        self.linear = nn.Linear(width, vocab_size)
        self.modulation = nn.Linear(cond_size, 2 * width) if cond_size else None

    def forward(self, x: Tensor, cond: Tensor | None, at: Tensor | None) -> Tensor:
        """Logits at all tokens of x [B, T, D], or, with `at` [B, T] boolean, at its N true places alone: [N, V]."""
        x = self.norm(x)
        if self.modulation is not None and cond is not None:
            shift, scale = self.modulation(cond)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return self.linear(x if at is None else x[at])
