"""The head and its loss by themselves, forward and backward: chunked, against whole logits at masked or all positions.

    python -m benchmarks.head_loss [--vocab 50258 --width 256 --tokens 4096 --masked 2048]

`chunked` is what training does; `masked` keeps the logits of the masked tokens and leaves gradients to autograd;
`everywhere` makes logits of all 2L positions of the noisy and clean tokens, as published code does. Products of the
masked tokens alone are `flops`; `floor_seconds` are theirs at the rates measured in the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.runtime.allocator import keep_freed_memory
from benchmarks import costs, measure
from benchmarks.reference import negative_log_likelihood


def main(argv: list[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--vocab", type=int, default=50258)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096, help="noisy tokens; as many clean ones lie beside them")
    parser.add_argument("--masked", type=int, default=2048)
    options = parser.parse_args(argv)
    keep_freed_memory()
    results = {precision: compare(precision, options) for precision in ("fp32", "bf16")}
    measure.finish("head_loss", options, results, options.json)
    return 0


def compare(precision: str, options: Any) -> dict[str, Any]:
    """Times of the three ways and the floor."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    seconds = measure.interleaved(ways(dtype, options), options.repeats)
    times = {name: measure.summary(values) for name, values in seconds.items()}
    product = costs.Product("head", options.masked, options.width, options.vocab, 1)
    least = sum(costs.times_of(product, dtype))
    return {
        "seconds": times,
        "speedup_to_masked": times["masked"]["median"] / times["chunked"]["median"],
        "speedup_to_everywhere": times["everywhere"]["median"] / times["chunked"]["median"],
        "flops": 3 * product.flops,
        "floor_seconds": least,
        "floor_share": least / times["chunked"]["median"],
    }


def ways(dtype: torch.dtype, options: Any) -> dict[str, Callable[[], object]]:
    """Each gives gradients of hidden states, matrix and bias."""
    mask_id = options.vocab - 1
    hidden = torch.randn(2 * options.tokens, options.width, dtype=dtype, requires_grad=True)
    matrix = (torch.randn(options.vocab, options.width) * 0.02).to(dtype).requires_grad_()
    bias = torch.zeros(options.vocab, dtype=dtype, requires_grad=True)
    leaves = (hidden, matrix, bias)
    at = torch.randperm(options.tokens)[: options.masked].sort().values
    x0 = torch.randint(0, mask_id, (options.tokens,))
    weight = torch.rand(options.masked)
    read = SubsNats(x0[at], mask_id, weight)
    x_t = x0.index_fill(0, at, mask_id)

    def masked() -> object:
        logits = torch.nn.functional.linear(hidden[at], matrix, bias)
        return torch.autograd.grad(read.of_logits(logits)[0], leaves)

    def everywhere() -> object:
        logits = torch.nn.functional.linear(hidden, matrix, bias)[None, : options.tokens]
        nats = negative_log_likelihood(logits, x_t[None], x0[None], mask_id)
        return torch.autograd.grad((nats[0, at] * weight).sum(), leaves)

    return {
        "chunked": lambda: torch.autograd.grad(read(hidden[at], matrix, bias)[0], leaves),
        "masked": masked,
        "everywhere": everywhere,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
