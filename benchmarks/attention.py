"""Attention by itself: time and memory from L = 256 to 8192, forward and backward, for each way to do it.

    python -m benchmarks.attention [--lengths 256 1024 4096 8192] [--block-size 16] [--precisions fp32 bf16]

`stripes` is what training takes on CPUs; `dense` is torch's fused kernel under the dense 2L x 2L mask, as published
code has it (up to --dense-limit); `sdpa_full` is the same kernel without a mask on L tokens, MDLM's. `flops` are those
of the pairs that the mask allows, forward and backward; `pairs_share` is their share of 2L x 2L.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from bd3_ds.model.attention.attention import attend
from bd3_ds.model.attention.masks import pass_mask
from bd3_ds.runtime.allocator import keep_freed_memory
from benchmarks import measure


def main(argv: list[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch, whatever the length: batch = tokens / L")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=32)
    parser.add_argument("--dense-limit", type=int, default=1024, help="longest L that the dense mask is tried with")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    options = parser.parse_args(argv)
    keep_freed_memory()
    results = []
    for precision in options.precisions:
        for length in options.lengths:
            found = one(length, precision, options)
            measure.say(f"{precision} {length}: {found['seconds']['stripes']['median']:.3f} s")
            results.append(found)
    measure.finish("attention", options, results, options.json)
    return 0


def one(length: int, precision: str, options: Any) -> dict[str, Any]:
    """Seconds of a layer's attention over the batch, forward and backward."""
    batch, size = max(1, options.tokens // length), options.block_size
    cpu = torch.device("cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shape = (batch, options.heads, 2 * length, options.head_width)
    mask = pass_mask(length, length, 0, 0, size, False, cpu)
    ways = {"stripes": both(shape, dtype, lambda q, k, v: attend(q, k, v, mask, "stripes"))}
    if length <= options.dense_limit:
        ways["dense"] = both(shape, dtype, lambda q, k, v: attend(q, k, v, mask, "sdpa"))
    full = pass_mask(length, 0, 0, 0, length, False, cpu)
    ways["sdpa_full"] = both((*shape[:2], length, shape[3]), dtype, lambda q, k, v: attend(q, k, v, full, "sdpa"))
    seconds = measure.interleaved(ways, options.repeats)
    times = {name: measure.summary(values) for name, values in seconds.items()}
    blocks = length // size
    pairs = size**2 * blocks * (blocks + 1)
    flops = 3 * 4.0 * batch * options.heads * options.head_width * pairs
    return {
        "length": length,
        "batch": batch,
        "precision": precision,
        "seconds": times,
        "flops": flops,
        "flops_per_s": flops / times["stripes"]["median"],
        "microseconds_per_token": 1e6 * times["stripes"]["median"] / (batch * length),
        "pairs_share": pairs / (2 * length) ** 2,
    }


def both(shape: tuple[int, ...], dtype: torch.dtype, way: Callable[..., torch.Tensor]) -> Callable[[], object]:
    """A forward and backward pass over random numbers."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    above = torch.randn(shape, dtype=dtype)
    return lambda: torch.autograd.grad(way(q, k, v), (q, k, v), above)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
