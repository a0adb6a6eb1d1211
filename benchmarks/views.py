"""Noisy views that share a clean pass: tokens of loss per second for K = 1, 2, 4, in turns.

    python -m benchmarks.views [--configuration b] [--precision bf16] [--views 1 2 4]

A token of loss is a masked one: what a step learns from. `flops_ratio` is a step's counted FLOPs over that of one view.
What views do to the bound at equal cost: `python -m benchmarks.ablations --only "log_linear,views 4; fewer steps,…"`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from bd3_ds.config.schema import BD3
from bd3_ds.model.build import dit_config
from bd3_ds.model.flops import training_flops_per_sequence
from benchmarks import measure, ours


def main(argv: list[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--configuration", choices=ours.CONFIGURATIONS, default="b")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args(argv)
    given = ours.CONFIGURATIONS[options.configuration]
    runs = {k: ours.make_run(given, BD3, options.precision, f"objective.views={k}") for k in options.views}
    steps: dict[str, Callable[[], object]] = {str(k): ours.make_step(run) for k, run in runs.items()}
    network = dit_config(runs[options.views[0]].model, BD3)
    flops = {
        k: training_flops_per_sequence(network, BD3, given.length, given.block_size, 0.5, k)
        for k in {1, *options.views}
    }
    results = []
    for name, seconds in measure.interleaved(steps, options.repeats).items():
        times, k = measure.summary(seconds), int(name)
        masked = given.batch * (given.length - 1) / 2 * k
        results.append(
            {
                "views": k,
                "seconds": times,
                "loss_tokens_per_s": measure.rate(masked, times),
                "flops_ratio": flops[k] / flops[1],
            }
        )
    measure.finish("views", options, results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
