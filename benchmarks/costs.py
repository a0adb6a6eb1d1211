"""What a training step must cost on this machine: its products, each at the rate measured for its shape, and its bytes.

The floor counts what mask and loss ask for and nothing else: no recomputation, no hidden pairs, no logits without a
loss, clean tokens of the last layer as keys and values alone. Elementwise work is not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.model.dit import DiTConfig


@dataclass(frozen=True)
class Product:
    """`count` products of [batch, m, k] and [batch, k, n] in the forward pass; each has two more behind it."""

    kind: str
    m: int
    k: int
    n: int
    count: float
    batch: int = 1

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return 2.0 * self.batch * self.m * self.k * self.n * self.count


def products(
    network: DiTConfig, objective: str, length: int, block_size: int, batch: int, masked: float, views: int = 1
) -> list[Product]:
    """The products of one step on `batch` sequences of which a share `masked` of the noisy tokens carries a loss."""
    width, heads, wide = network.hidden_size, network.heads, network.mlp_ratio * network.hidden_size
    noisy = batch * length * views
    clean = batch * length if not OBJECTIVES[objective].causal and block_size < length else 0
    scored = round(batch * (length - 1) * (1.0 if OBJECTIVES[objective].causal else masked) * views)
    blocks = length // block_size
    pairs = block_size**2 * blocks * (blocks + 1) // 2  # what one stream sees of clean and own tokens
    if OBJECTIVES[objective].causal:
        pairs = length * (length + 1) // 2
    streams = (views + (1 if clean else 0)) * (network.layers - 1) + views
    # Scores by rectangles of 128 queries and 640 keys, a typical one; their number is what the mask asks for.
    rectangles = pairs * streams / (128 * 640)
    counted = [
        *_layer("body", noisy + clean, width, wide, network.layers - 1),
        *_layer("body", noisy, width, wide, 1),
        Product("head", scored, width, network.vocab_size, 1),
        Product("attention", 128, width // heads, 640, rectangles, batch * heads),
        Product("attention", 128, 640, width // heads, rectangles, batch * heads),
    ]
    if clean:
        counted.append(Product("body", clean, width, 2 * width, 1))
    return counted


def _layer(kind: str, tokens: int, width: int, wide: int, layers: int) -> list[Product]:
    shapes = [(width, 3 * width), (width, width), (width, wide), (wide, width)]
    return [Product(kind, tokens, k, n, layers) for k, n in shapes if layers]


def floor(counted: list[Product], parameters: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds by kind and in all, FLOPs by kind; measures the rates now."""
    seconds: dict[str, float] = {}
    flops: dict[str, float] = {}
    for product in counted:
        each = sum(times_of(product, dtype))
        seconds[product.kind] = seconds.get(product.kind, 0.0) + each * product.count
        flops[product.kind] = flops.get(product.kind, 0.0) + 3 * product.flops
    # AdamW reads weight, gradient and two moments and writes three of them; the norm reads gradients once more; the
    # average reads weights and itself and writes itself. All fp32.
    seconds["optimizer"] = (7 + 1 + 3) * 4 * parameters / copy_rate()
    return {"seconds": seconds, "total_seconds": sum(seconds.values()), "flops": flops}


def times_of(product: Product, dtype: torch.dtype) -> list[float]:
    """Seconds of a forward product and of its two backward ones."""
    batch, m, k, n = product.batch, product.m, product.k, product.n
    a, w, g = (torch.randn(shape, dtype=dtype) for shape in ((batch, m, k), (batch, n, k), (batch, m, n)))
    if batch == 1:
        a, w, g = a[0], w[0], g[0]
    return [
        median_seconds(lambda: a @ w.transpose(-1, -2)),
        median_seconds(lambda: g @ w),
        median_seconds(lambda: g.transpose(-1, -2) @ a),
    ]


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of two products, bytes/s of a copy and numbers/s of exp, as they were taken beside upstream's times."""
    known = (Product("head", 1024, 256, 50258, 1), Product("body", 4096, 256, 1024, 1))
    rates = {product.kind: product.flops / times_of(product, dtype)[0] for product in known}
    x = torch.randn(2**20)
    out = torch.empty_like(x)
    return {**rates, "copy": copy_rate(), "exp": len(x) / median_seconds(lambda: torch.exp(x, out=out))}


def copy_rate() -> float:
    """Bytes/s, read and written ones together."""
    a = torch.randn(2**26)
    b = torch.empty_like(a)
    return 2 * 4 * len(a) / median_seconds(lambda: b.copy_(a))


def median_seconds(work: Callable[[], Tensor], repeats: int = 5) -> float:
    """After one run to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
