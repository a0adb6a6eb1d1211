"""The parts of the network: time conditioning, one transformer layer, the head.

Letters in shape comments: B batch, T packed tokens, D width, H heads, d head width, C conditioning width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3_ds.model.attention.attention import attend
from bd3_ds.model.attention.masks import AttentionMask
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.model.dropout import dropout
from bd3_ds.model.kv_cache import KVCache
from bd3_ds.model.norm import Norm
from bd3_ds.model.rope import rotate

# A function of the hidden states [N, D], the output matrix [V or more, D] and its bias [V], called in place of the
# head.
HeadReadout = Callable[[Tensor, Tensor, Tensor], Any]


_ACTIVATION = {"gelu": "tanh", "gelu_erf": "none"}


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

    def __init__(self, index: int, network: DiTConfig, cond_size: int | None):
        super().__init__()
        width, wide, biases = network.hidden_size, network.mlp_width, network.biases
        self.index = index
        self.heads = network.heads
        self.key_heads = network.key_heads
        self.dropout = network.dropout
        self.backend = network.attention
        self.attend, self.drop = attend, dropout  # attributes, so that `parallel` may replace them
        self.mlp = network.mlp
        self.norm_attention = Norm(network)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.key_heads) * network.head_width, bias="qkv" in biases)
        self.out = nn.Linear(width, width, bias="out" in biases)
        self.norm_mlp = Norm(network)
        self.gate = nn.Linear(width, wide, bias="mlp" in biases) if self.mlp == "swiglu" else None
        self.up = nn.Linear(width, wide, bias="mlp" in biases)
        self.down = nn.Linear(wide, width, bias="mlp" in biases)
        self.modulation = nn.Linear(cond_size, 6 * width) if cond_size else None

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask,
        cache: KVCache | None = None,
        update_cache: bool = False,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, Q, D], where Q = queries of the mask, the first Q of the T tokens.

        With a `cache`, the tokens also attend to what it holds; with `update_cache`, they are appended to it.
        `query_index` [B, Q]: the only queries to compute, under a mask that hides nothing.
        """
        if self.modulation is None or cond is None:
            attended = self._attention(self.norm_attention(x), cos, sin, mask, cache, update_cache, query_index)
            x = _queries(x, query_index, attended.shape[1]) + self.drop(attended, self.dropout, self.training)
            return x + self.drop(self.mix(self.norm_mlp(x)), self.dropout, self.training)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond).chunk(6, dim=-1)  # [1 or B, D]
        attended = self._attention(
            self.norm_attention(x, scale_a, shift_a), cos, sin, mask, cache, update_cache, query_index
        )
        attended = self.drop(attended, self.dropout, self.training)
        x = torch.addcmul(_queries(x, query_index, attended.shape[1]), attended, gate_a[:, None])
        mixed = self.drop(self.mix(self.norm_mlp(x, scale_m, shift_m)), self.dropout, self.training)
        return torch.addcmul(x, mixed, gate_m[:, None])

    def _attention(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask,
        cache: KVCache | None,
        update_cache: bool,
        query_index: Tensor | None,
    ) -> Tensor:
        batch, tokens, width = x.shape
        queries = len(mask.queries) if query_index is None else query_index.shape[1]
        qkv = self.qkv(x).view(batch, tokens, -1, width // self.heads).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.key_heads, self.key_heads], dim=1)  # [B, H, T, d], k and v of fewer heads
        scale = (width // self.heads) ** -0.5
        if query_index is None:
            q = rotate(q[:, :, :queries], cos[:queries] * scale, sin[:queries] * scale)
        else:
            q = q.gather(2, query_index[:, None, :, None].expand(-1, self.heads, -1, q.shape[-1]))  # [B, H, Q, d]
            q = rotate(q, cos[query_index][:, None] * scale, sin[query_index][:, None] * scale)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extended(self.index, k, v, keep=update_cache)
        mixed = self.attend(q, k, v, mask if query_index is None else None, self.backend)  # [B, H, Q, d]
        return self.out(mixed.transpose(1, 2).reshape(batch, queries, width))

    def mix(self, x: Tensor) -> Tensor:
        """The MLP: x [B, T, D] -> [B, T, D]."""
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate=_ACTIVATION[self.mlp]))


def _queries(x: Tensor, query_index: Tensor | None, count: int) -> Tensor:
    """The query tokens of x [B, T, D]: [B, Q, D]."""
    if query_index is None:
        return x[:, :count]
    return x.gather(1, query_index[..., None].expand(-1, -1, x.shape[-1]))


class Head(nn.Module):
    """Final norm and the projection to the vocabulary, [N, D] or [B, T, D] -> [..., V]; its matrix has `rows` >= V."""

    def __init__(self, network: DiTConfig, cond_size: int | None):
        super().__init__()
        width = network.hidden_size
        self.vocab_size = network.vocab_size
        self.norm = Norm(network)
        self.linear = nn.Linear(width, network.vocab_rows, bias="head" in network.biases)
        self.modulation = nn.Linear(cond_size, 2 * width) if cond_size else None

    def forward(self, x: Tensor, cond: Tensor | None, at: Tensor | None, read: HeadReadout | None) -> Any:
        """Logits at all tokens of x [B, T, D], or, with `at` [N], only at these of the B x T: [N, V].

        With `read`, its result on their hidden states and the projection, so that logits need not be stored.
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
        bias = x.new_zeros(self.vocab_size) if self.linear.bias is None else self.linear.bias[: self.vocab_size]
        return read(x, self.linear.weight, bias)
