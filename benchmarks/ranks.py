"""What two ranks gain over one: step time under the launcher by ZeRO stage and precision, always the same global batch.

    python -m benchmarks.ranks [--model tiny] [--vocab 1024] [--length 256] [--steps 12] [--rounds 1] [--json FILE]

Three ways to use two cores, each with as many sequences a step: 2 ranks of 1 thread, 1 rank of 2 threads, 1 rank of 1
thread (of which one core is idle). A rank takes its share of the batch in one pass. `seconds` are those of the steps in
records/train.jsonl, without the first two of each run and over all rounds; a round launches every run once.

The share of communication is estimated, not measured, in two ways:
  over_half     (t_2x1 - t_1x1 / 2) / t_2x1: what is beyond a perfect halving of one thread's work. It also holds what
                two busy cores take from each other (memory bandwidth, caches) and work that is done on both ranks
  over_threads  (t_2x1 - t_1x2) / t_2x1: what ranks cost over threads of one process on the same cores. Threads have
                losses of their own, so it may well be below zero
For CPUs: where there is a GPU its ranks compute there, and threads mean little. --threads and --repeats change nothing.
Threads wait by spinning: where something else takes a core, 1x2 gets slower many times over, so keep the machine free.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from bd3_ds.runtime import records
from bd3_ds.runtime.run_dir import TRAIN_RECORDS
from benchmarks.measure import finish, parser, run_to_end, say, summary
from tests.helpers.tiny import tiny_pack, tiny_tokenizer

LAYOUTS = {"2x1": (2, 1), "1x2": (1, 2), "1x1": (1, 1)}  # ranks, threads of each
LEFT_OUT = 2  # steps at the start of a run: memory is fetched, buckets are laid out

Case = tuple[str, int, str]  # precision, stage, layout


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="tiny", help="a name in configs/model")
    options.add_argument("--vocab", type=int, default=1024, help="[MASK] included; 80 to some thousands")
    options.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    options.add_argument("--block-size", type=int, default=16)
    options.add_argument("--batch", type=int, default=8, help="sequences of a step, over all ranks")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--rounds", type=int, default=1, help="times that every run is launched")
    options.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    asked = options.parse_args(argv)
    if asked.steps <= LEFT_OUT:
        options.error(f"--steps must be above {LEFT_OUT}, the steps that do not count")
    if asked.batch % 2:
        options.error("--batch must be even, for two ranks")
    with tempfile.TemporaryDirectory() as scratch:
        seconds = measure(Path(scratch), asked)
    settings = {key: value for key, value in vars(asked).items() if key not in ("threads", "repeats")}
    finish("ranks", settings, tabulate(asked, seconds), asked.json)
    return 0


def measure(scratch: Path, asked: argparse.Namespace) -> dict[Case, list[float]]:
    """Seconds of all counted steps of each case; the order of a round is turned round in the next one."""
    recipe = write_recipe(scratch, asked)
    cases: list[Case] = list(itertools.product(asked.precision, asked.stages, LAYOUTS))
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for number in range(asked.rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            precision, stage, layout = case
            ranks, threads = LAYOUTS[layout]
            run_dir = scratch / f"{number}-{precision}-{stage}-{layout}"
            words = ["train", str(recipe), f"run_dir={run_dir}", f"train.precision={precision}"]
            words += [f"train.micro_batch={asked.batch // ranks}", "--deepspeed_config", f"ds_configs/zero{stage}.json"]
            run_to_end(words, scratch / "run.log", ranks=ranks, threads=threads)
            lines = records.read(run_dir / TRAIN_RECORDS)
            seconds[case] += [line["seconds"] for line in lines[LEFT_OUT:]]
            say(f"round {number + 1}, {precision}, stage {stage}, {layout}: {summary(seconds[case])['median']:.3f} s")
    return seconds


def write_recipe(scratch: Path, asked: argparse.Namespace) -> Path:
    """One epoch is the whole run, and nothing but steps happens in it; EMA, clipping and records are as ever."""
    tokenizer = tiny_tokenizer(asked.vocab - 1)
    tiny_pack(scratch / "pack", length=asked.length, chunks=asked.batch * asked.steps, tokenizer=tokenizer)
    recipe = scratch / "recipe.yaml"
    recipe.write_text(
        f"include: [model/{asked.model}]\n"
        f"data: {{train: {scratch / 'pack'}, length: {asked.length}}}\n"
        f"objective: {{name: bd3, block_size: {asked.block_size}}}\n"
        f"train: {{total_steps: {asked.steps}, global_batch: {asked.batch}, log_every: 1000000, "
        "checkpoint_every: 1000000, export_every: 1000000}\n"
    )
    return recipe


def tabulate(asked: argparse.Namespace, seconds: dict[Case, list[float]]) -> list[dict[str, Any]]:
    """One dictionary a precision and stage."""
    rows = []
    for precision in asked.precision:
        for stage in asked.stages:
            times = {layout: summary(seconds[precision, stage, layout]) for layout in LAYOUTS}
            two, threads, one = (times[layout]["median"] for layout in LAYOUTS)
            rows.append(
                {
                    "precision": precision,
                    "stage": stage,
                    "seconds": times,
                    "tokens_per_s": {name: asked.batch * asked.length / t["median"] for name, t in times.items()},
                    "speedup_over_1x1": {"2x1": one / two, "1x2": one / threads},
                    "communication_share": {
                        "over_half": (two - one / 2) / two,
                        "over_threads": (two - threads) / two,
                    },
                }
            )
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
