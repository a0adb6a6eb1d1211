"""The parts of the network: norm, time conditioning, one transformer layer, the head.

Letters in shape comments: B batch, T packed tokens, D width, H heads, d head width, C conditioning width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_ds.model.attention import attend
from bd3_ds.model.dropout import dropout
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.model.masks import AttentionMask
from bd3_ds.model.rope import rotate

# What a head's caller makes of the hidden states [N, D], the output matrix [V or more, D] and its bias [V].
Read = Callable[[Tensor, Tensor, Tensor], Any]


class Norm(nn.Module):
    """LayerNorm without bias, then scaled by 1 + `scale` and shifted: both [1 or B, D], or None."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        # torch's kernel computes in fp32 whatever the dtype of its input.
        shape, weight = (x.shape[-1],), self.weight
        if scale is None or shift is None:
            return F.layer_norm(x, shape, weight.to(x.dtype), None, 1e-5)
        if len(scale) == 1:  # the same for all rows, so that the kernel can do it in the same sweep
            scaled = weight.float() * (1 + scale[0].float())
            return F.layer_norm(x, shape, scaled.to(x.dtype), shift[0].to(x.dtype), 1e-5)
        normed = F.layer_norm(x, shape, weight.to(x.dtype), None, 1e-5)
        return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


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
        self.attend = attend
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
            x = x[:, : attended.shape[1]] + dropout(attended, self.dropout, self.training)
            return x + dropout(self._mlp(self.norm_mlp(x)), self.dropout, self.training)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond).chunk(6, dim=-1)  # [1 or B, D]
        attended = self._attention(self.norm_attention(x, scale_a, shift_a), cos, sin, mask, cache, grow)
        attended = dropout(attended, self.dropout, self.training)
        x = torch.addcmul(x[:, : attended.shape[1]], attended, gate_a[:, None])
        mixed = dropout(self._mlp(self.norm_mlp(x, scale_m, shift_m)), self.dropout, self.training)
        return torch.addcmul(x, mixed, gate_m[:, None])

    def _attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, cache: KVCache | None, grow: bool
    ) -> Tensor:
        batch, tokens, width = x.shape
        queries = len(mask.queries)
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, d]
        scale = (width // self.heads) ** -0.5
        q = rotate(q[:, :, :queries], cos[:queries] * scale, sin[:queries] * scale)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.joined(self.index, k, v)
            if grow:
                cache.store(self.index, k, v)
        mixed = self.attend(q, k, v, mask, self.backend)  # [B, H, Q, d]
        return self.out(mixed.transpose(1, 2).reshape(batch, queries, width))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Head(nn.Module):
    """Final norm and the projection to the vocabulary, [N, D] or [B, T, D] -> [..., V]; its matrix has `rows` >= V."""

    def __init__(self, width: int, vocab_size: int, rows: int, cond_size: int | None):
        super().__init__()
        self.vocab_size = vocab_size
        self.norm = Norm(width)
        self.linear = nn.Linear(width, rows)
        self.modulation = nn.Linear(cond_size, 2 * width) if cond_size else None

    def forward(self, x: Tensor, cond: Tensor | None, at: Tensor | None, read: Read | None) -> Any:
        """Logits at all tokens of x [B, T, D], or, with `at` [N], at these of the B x T alone: [N, V].

        With `read`, what it makes of their hidden states and of the projection, whose logits need not be kept.
        """
        rows = None
        if at is not None:
            rows = at // x.shape[1]
            x = x.flatten(0, 1)[at]  # [N, D]
        if self.modulation is None or cond is None:
            x = self.norm(x)
        else:
            shift, scale = self.modulation(cond).chunk(2, dim=-1)  # [1 or B, D]
            if rows is not None and len(shift) > 1:
                x = self.norm(x[:, None], scale[rows], shift[rows])[:, 0]
            else:
                x = self.norm(x, scale, shift)
        if read is None:
            return self.linear(x)[..., : self.vocab_size]
        return read(x, self.linear.weight, self.linear.bias[: self.vocab_size])
