"""A training step as the published BD3-LM code does it, written anew: what our step is compared with.

The same network (Peebles & Xie 2023, as in Sahoo et al. 2024) and the same objective, done in the plain way:
  - noisy and clean tokens go through every layer together, the head included: logits at all 2L positions, half dropped;
  - attention under a dense boolean mask over 2L x 2L;
  - the loss over whole logits: log-sum-exp, carry-over of unmasked tokens, a scan for nan, then a gather;
  - bf16 by autocast over fp32 weights; AdamW and the average of the weights parameter by parameter.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEVER = -1e6  # the logit of what is impossible


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            normed = F.layer_norm(x.float(), (x.shape[-1],))
        return normed * self.weight


class Block(nn.Module):
    def __init__(self, width: int, heads: int, cond_size: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = Norm(width), Norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(cond_size, 6 * width)

    def forward(
        self, x: Tensor, cond: Tensor, angles: tuple[Tensor, Tensor], length: int, mask: Tensor | None
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond)[:, None].chunk(6, dim=2)
        modulated = self.norm_attention(x) * (1 + scale_a) + shift_a
        streams = [self._project(part, angles) for part in modulated.split(length, dim=1)]
        q, k, v = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*streams, strict=True))  # [B, H, T, d]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + gate_a * F.dropout(self.out(mixed), self.dropout, self.training)
        mixed = self.mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m)
        return x + gate_m * F.dropout(mixed, self.dropout, self.training)

    def _project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> list[Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # [B, L, H, d]
        with torch.autocast(x.device.type, enabled=False):
            return [_rotate(q, *angles).to(v.dtype), _rotate(k, *angles).to(v.dtype), v]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return x.float() * cos + torch.cat([-b, a], dim=-1) * sin


class Reference(nn.Module):
    """Logits [B, L, V] of noisy tokens; `tokens` [B, 2L] holds clean ones behind them, or [B, L] none."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, cond_size: int, dropout: float):
        super().__init__()
        self.head_width = width // heads
        self.embed = nn.Embedding(vocab, width)
        self.time = nn.Sequential(nn.Linear(256, cond_size), nn.SiLU(), nn.Linear(cond_size, cond_size))
        self.blocks = nn.ModuleList(Block(width, heads, cond_size, dropout) for _ in range(layers))
        self.norm = Norm(width)
        self.modulation = nn.Linear(cond_size, 2 * width)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor, length: int, mask: Tensor | None) -> Tensor:
        x = self.embed(tokens)
        level = torch.cat([torch.ones(128, device=x.device), torch.zeros(128, device=x.device)])  # cos 0 and sin 0
        cond = F.silu(self.time(level.expand(len(tokens), -1)))
        ladder = 10_000.0 ** (-torch.arange(0, self.head_width, 2, device=x.device) / self.head_width)
        angle = torch.arange(length, device=x.device)[:, None] * ladder
        angle = torch.cat([angle, angle], dim=-1)[None, :, None]  # [1, L, 1, d]
        for block in self.blocks:
            x = block(x, cond, (angle.cos(), angle.sin()), length, mask)
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=2)
        logits: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return logits[:, :length]


def dense_mask(length: int, block_size: int) -> Tensor:
    """True [2L, 2L] where noisy and clean tokens see each other (Arriola et al. 2025, figure 2)."""
    place = torch.arange(2 * length)
    block, clean = place % length // block_size, place >= length
    own = (block[:, None] == block) & (clean[:, None] == clean)
    return own | (clean & (block < block[:, None]))


def negative_log_likelihood(logits: Tensor, x_t: Tensor, x0: Tensor, mask_id: int) -> Tensor:
    """-log p(x0) [B, L], 0 where a token is not masked; overwrites the logits."""
    if torch.isnan(logits).any():
        raise FloatingPointError("logits are nan")
    logits[:, :, mask_id] += NEVER
    log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    unmasked = x_t != mask_id
    log_probs[unmasked] = NEVER
    log_probs[unmasked, x_t[unmasked]] = 0
    return -log_probs.gather(-1, x0[:, :, None])[:, :, 0]


def make_step(
    model: Reference, length: int, batch: int, block_size: int, bf16: bool, seconds: dict[str, list[float]]
) -> Callable[[], None]:
    """One training step on random tokens; `seconds` collects the time of each of its stages."""
    vocab = model.head.out_features
    device = next(model.parameters()).device
    mask = dense_mask(length, block_size).to(device) if block_size < length else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    average = [p.detach().clone() for p in model.parameters()]
    x0 = torch.randint(0, vocab - 1, (batch, length), device=device)

    def step() -> None:
        marks = [("", time.perf_counter())]
        t = 1e-3 + (1 - 1e-3) * torch.rand(batch, length // block_size, device=device)
        t = t.repeat_interleave(block_size, dim=1)
        x_t = torch.where(torch.rand(batch, length, device=device) < t, vocab - 1, x0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(x_t if mask is None else torch.cat([x_t, x0], dim=1), length, mask)
            loss = (negative_log_likelihood(logits, x_t, x0, vocab - 1) / t).mean()
        del logits
        marks.append(("forward", time.perf_counter()))
        loss.backward()
        marks.append(("backward", time.perf_counter()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        marks.append(("clip", time.perf_counter()))
        optimizer.step()
        optimizer.zero_grad()
        marks.append(("adamw", time.perf_counter()))
        with torch.no_grad():
            for old, new in zip(average, model.parameters(), strict=True):
                old.sub_(1e-4 * (old - new))
        marks.append(("ema", time.perf_counter()))
        for (_, before), (name, after) in itertools.pairwise(marks):
            seconds.setdefault(name, []).append(after - before)

    return step
