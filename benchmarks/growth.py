"""How a training step grows with the length: time per token and peak memory, against the FLOPs that the mask asks for.

    python -m benchmarks.growth [--lengths 256 512 1024 2048 4096 8192] [--tokens 8192] [--model tiny]

Every length has the same number of tokens in a step (batch = tokens / L) and a process of its own. `attention_share` is
that of attention, timed by itself for one layer and multiplied, in the step. A fixed cost per token and one that grows
with L are both in the FLOP count; `flops_per_s` must therefore not fall with the length.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from typing import Any

from bd3_ds.model.build import dit_config
from bd3_ds.model.flops import training_flops_per_sequence
from benchmarks import attention, measure, ours


def main(argv: list[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--vocab", type=int, default=50258)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    options = parser.parse_args(argv)
    results = []
    for length in options.lengths:
        given = ours.Configuration(
            options.model, options.vocab, length, options.block_size, max(1, options.tokens // length)
        )
        with measure.Process() as process:
            results.append(process.call(one, given, options.precision, options.repeats))
        measure.say(f"{length}: {results[-1]['microseconds_per_token']:.0f} us a token")
    measure.finish("growth", options, results, options.json)
    return 0


def one(sizes: ours.Configuration, precision: str, repeats: int) -> dict[str, Any]:
    """A length's figures."""
    run = ours.make_run(sizes, "bd3", precision)
    network = dit_config(run.model, "bd3")
    step, seconds, masked = ours.make_step(run), [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        masked.append(step().masked_share)
        seconds.append(time.perf_counter() - start)
    memory = measure.peak_rss_gb()
    share = statistics.mean(masked)
    flops = sizes.batch * training_flops_per_sequence(network, "bd3", sizes.length, sizes.block_size, share)
    times = measure.summary(seconds[1:])
    layer = attention.one(
        sizes.length,
        precision,
        Namespace(
            tokens=sizes.batch * sizes.length,
            block_size=sizes.block_size,
            heads=network.heads,
            head_width=network.hidden_size // network.heads,
            dense_limit=0,
            repeats=3,
        ),
    )
    in_attention = layer["seconds"]["stripes"]["median"] * (network.layers - 0.5)  # the last layer asks half
    return {
        "length": sizes.length,
        "batch": sizes.batch,
        "seconds": times,
        "microseconds_per_token": 1e6 * times["median"] / (sizes.batch * sizes.length),
        "flops": flops,
        "flops_per_s": flops / times["median"],
        "attention_share": in_attention / times["median"],
        "peak_memory_gib": memory,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
