"""What was tried for speed on CPUs and not taken, against what was, in turns: forward and backward at configuration b.

    python -m benchmarks.tried [--groups stripes elementwise head] [--precisions fp32 bf16]

stripes      one layer's attention: stripes of at most 64, 128 (taken) and 256 queries; the same stripes by torch's
             fused kernel under each stripe's mask
elementwise  rotation, norm with modulation, GELU, dropout: as taken, and plain code under torch.compile
head         head and loss: as taken, in chunks of 256 tokens, and by torch's linear_cross_entropy where torch has it
             (nats of every token are wanted, weighted by numbers of their own)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_ds.diffusion import chunked_head
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.model.attention import stripes
from bd3_ds.model.attention.masks import AttentionMask, pass_mask
from bd3_ds.model.attention.stripe_attention import attend_in_stripes
from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.model.dropout import dropout
from bd3_ds.model.norm import Norm
from bd3_ds.model.rope import rotary_angles, rotate
from bd3_ds.runtime.allocator import keep_freed_memory
from benchmarks import measure

BATCH, LENGTH, HEADS, WIDTH, VOCAB, BLOCK = 4, 1024, 8, 256, 50258, 16
Ways = dict[str, Callable[[], object]]


def main(argv: list[str]) -> int:
    groups: dict[str, Callable[[torch.dtype], Ways]] = {
        "stripes": attention_ways,
        "elementwise": elementwise_ways,
        "head": head_ways,
    }
    parser = measure.parser(__doc__)
    parser.add_argument("--groups", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    options = parser.parse_args(argv)
    keep_freed_memory()
    results = []
    for precision in options.precisions:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for group in options.groups:
            seconds = measure.interleaved(groups[group](dtype), options.repeats, warmup=2)
            times = {name: measure.summary(values) for name, values in seconds.items()}
            results.append({"precision": precision, "group": group, "seconds": times})
    measure.finish("tried", options, results, options.json)
    return 0


def both(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward of a function with one output."""
    above = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, above)


def attention_ways(dtype: torch.dtype) -> Ways:
    q, k, v = (torch.randn(BATCH, HEADS, 2 * LENGTH, WIDTH // HEADS, dtype=dtype, requires_grad=True) for _ in range(3))
    masks = {rows: mask_of(rows) for rows in (64, 128, 256)}

    def ours(mask: AttentionMask) -> Callable[..., Tensor]:
        return lambda q, k, v: attend_in_stripes(q, k, v, mask)

    ways = {f"stripes of {rows}": both(ours(mask), q, k, v) for rows, mask in masks.items()}
    return {**ways, "fused kernel by stripes": both(fused(masks[128], dtype), q, k, v)}


def mask_of(rows: int) -> AttentionMask:
    """Noisy and clean tokens of b under stripes of at most `rows` queries."""
    limits = stripes.FEWEST_ROWS, stripes.ROWS
    stripes.FEWEST_ROWS = stripes.ROWS = rows
    pass_mask.cache_clear()
    try:
        return pass_mask(LENGTH, LENGTH, 0, 0, BLOCK, False, torch.device("cpu"))
    finally:
        stripes.FEWEST_ROWS, stripes.ROWS = limits
        pass_mask.cache_clear()


def fused(mask: AttentionMask, dtype: torch.dtype) -> Callable[..., Tensor]:
    """scaled_dot_product_attention on each stripe, its keys put together."""
    layout = mask.layout
    assert layout is not None
    biases = {}
    for stream in layout.streams:
        for stripe in stream.stripes:
            bias = torch.zeros(stripe.rows.stop - stripe.rows.start, stripe.columns, dtype=dtype)
            if stripe.bias is not None:
                bias[:, -stripe.bias.shape[1] :] = stripe.bias
            biases[stripe] = bias

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for stream in layout.streams:
            for stripe in stream.stripes:
                queries = q[:, :, stream.queries][:, :, stripe.rows]
                keys, values = (
                    torch.cat(
                        [x[:, :, layout.clean][:, :, : stripe.clean], x[:, :, stream.tokens][:, :, stripe.own]], 2
                    )
                    for x in (k, v)
                )
                mask_of_stripe = biases[stripe]
                parts.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask_of_stripe, scale=1.0))
        return torch.cat(parts, dim=2)

    return attend


def elementwise_ways(dtype: torch.dtype) -> Ways:
    x, up = (torch.randn(BATCH, 2 * LENGTH, n, dtype=dtype, requires_grad=True) for n in (WIDTH, 4 * WIDTH))
    heads = torch.randn(BATCH, HEADS, 2 * LENGTH, WIDTH // HEADS, dtype=dtype, requires_grad=True)
    cos, sin = rotary_angles(torch.arange(2 * LENGTH), WIDTH // HEADS, 10_000.0)
    norm = Norm(DiTConfig(1, WIDTH, 1, HEADS, 4, 1, True)).to(dtype)
    scale, shift = (torch.randn(1, WIDTH, dtype=dtype) for _ in range(2))

    def plain_rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def plain_norm(x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), (WIDTH,), norm.weight.float(), None, 1e-5).to(x.dtype)
        return normed * (1 + scale) + shift

    def gelu(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def plain_dropout(x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, True)

    return {
        "rotation": both(lambda x: rotate(x, cos, sin), heads),
        "rotation, compiled": both(torch.compile(plain_rotate), heads),
        "norm": both(lambda x: norm(x, scale, shift), x),
        "norm, compiled": both(torch.compile(plain_norm), x),
        "GELU": both(gelu, up),
        "GELU, compiled": both(torch.compile(gelu), up),
        "dropout": both(lambda x: dropout(x, 0.1, True), x),
        "dropout, torch's": both(plain_dropout, x),
        "dropout, compiled": both(torch.compile(plain_dropout), x),
    }


def head_ways(dtype: torch.dtype) -> Ways:
    masked = BATCH * LENGTH // 2
    hidden = torch.randn(masked, WIDTH, dtype=dtype, requires_grad=True)
    matrix = (torch.randn(VOCAB, WIDTH) * 0.02).to(dtype).requires_grad_()
    bias = torch.zeros(VOCAB, dtype=dtype, requires_grad=True)
    leaves, targets, weight = (hidden, matrix, bias), torch.randint(0, VOCAB - 1, (masked,)), torch.rand(masked)
    read = SubsNats(targets, VOCAB - 1, weight)

    def chunks_of(tokens: int) -> object:
        usual = chunked_head.CHUNK_BYTES
        chunked_head.CHUNK_BYTES = tokens * VOCAB * hidden.element_size()
        try:
            return torch.autograd.grad(read(*leaves)[0], leaves)
        finally:
            chunked_head.CHUNK_BYTES = usual

    ways: dict[str, Any] = {
        "head": lambda: torch.autograd.grad(read(*leaves)[0], leaves),
        "head, chunks of 256": lambda: chunks_of(256),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()

        def torchs() -> object:
            nats = F.linear_cross_entropy(hidden, matrix, targets, linear_bias=bias, reduction="none", options=options)
            return torch.autograd.grad((nats * weight).sum(), leaves)

        ways["head, linear_cross_entropy"] = torchs
    return ways


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
