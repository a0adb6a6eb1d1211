"""The plan of `run.py check` against what real steps allocate, kind by kind.

    python -m benchmarks.plan [--cases NAME …] [--json FILE]

Each case is a run's own steps in fresh rank processes (`counted.py`); the figures are rank 0's, in MiB. `weights`,
`optimizer` and `ema` are the bytes of their tensors between steps; `kept` is what autograd keeps at the end of a
forward pass (one rank alone). `forward`, `backward`, `update` and `peak` are the most that torch had allocated in the
last step, counted by its profiler from before the engine was built: what CUDA's allocator would have to hold, touched
or not, so that neither the interpreter nor the C library's slack is in it. `rss` is what the process's largest resident
memory grew by from before the engine to after the last step: it also has DeepSpeed's code, the profiler's records and
memory that is kept when freed, and is there to be seen, not compared. Buckets are 5 million numbers: at DeepSpeed's
default of 500 million, which the plan knows, they would hide everything else in models of this size.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bd3_ds.config.schema import block_size
from bd3_ds.model.build import dit_config
from bd3_ds.planning.activations import pass_of
from bd3_ds.planning.memory import memory_of, zero_of
from benchmarks.counted import Case, measure_ranks
from benchmarks.measure import finish, parser, say
from benchmarks.ours import Configuration

MIB = 2**20
BUCKET = 5_000_000
WIDE = ("model.hidden_size=512", "model.layers=5", "model.heads=8")


def _case(
    precision: str,
    stage: int,
    ranks: int,
    recompute: str = "none",
    objective: str = "bd3",
    configuration: Configuration | None = None,
    accumulation: int = 1,
    words: tuple[str, ...] = WIDE,
) -> Case:
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "overlap_comm": stage == 2}
    given = configuration or Configuration("tiny", 8192, 256, 16, 4)
    asked = (*words, f"train.activation_checkpointing={recompute}")
    return Case(given, objective, precision, ranks, zero, asked, accumulation)


CASES = {
    "fp32-0": _case("fp32", 0, 1),
    "bf16-0": _case("bf16", 0, 1),
    "bf16-1": _case("bf16", 1, 1, configuration=Configuration("tiny", 8192, 512, 16, 4)),
    "bf16-1-selective": _case("bf16", 1, 1, "selective"),
    "bf16-1-full": _case("bf16", 1, 1, "full"),
    "bf16-1-vocabulary": _case("bf16", 1, 1, configuration=Configuration("tiny", 50258, 512, 16, 4), words=()),
    "bf16-2-mdlm": _case("bf16", 2, 1, objective="mdlm", configuration=Configuration("tiny", 8192, 512, 512, 4)),
    "bf16-2-ar": _case("bf16", 2, 1, objective="ar", configuration=Configuration("tiny", 8192, 512, 1, 4)),
    "bf16-0-x2": _case("bf16", 0, 2),
    "bf16-1-x2": _case("bf16", 1, 2),
    "bf16-1-x2-accumulated": _case("bf16", 1, 2, accumulation=2),
    "bf16-2-x2": _case("bf16", 2, 2),
    "bf16-3-x2": _case("bf16", 3, 2),
    "fp32-2-x2-full": _case("fp32", 2, 2, "full"),
}


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    asked = options.parse_args(argv)
    results = []
    for name in asked.cases:
        results.append({"case": name, **compare(CASES[name])})
        say(f"{name}: {results[-1]['of_measured']}")
        if asked.json is not None:  # a case takes minutes on a busy machine
            asked.json.write_text(json.dumps(results, indent=2) + "\n")
    settings = {key: value for key, value in vars(asked).items() if key not in ("threads", "repeats")}
    finish("plan", settings, results, asked.json)
    return 0


def compare(case: Case) -> dict[str, Any]:
    """Planned and measured MiB by kind, and planned over measured."""
    run = case.run
    network = dit_config(run.model, run.objective.name)
    zero = zero_of({"zero_optimization": case.zero})
    plan = memory_of(run, network, block_size(run), zero, case.ranks, _recompute(case), cuda=False)
    found = measure_ranks(case)
    measured = {**found["kinds"], **found["moments"]}
    planned = {"weights": plan.weights, "optimizer": plan.optimizer, "ema": plan.ema, **plan.moments, "peak": plan.peak}
    if case.ranks == 1:
        measured["kept"], planned["kept"] = found["activations"], plan.activations + plan.head
    scored = pass_of(run, network, block_size(run), zero.stage, cuda=False).scored
    return {
        "precision": case.precision,
        "stage": zero.stage,
        "ranks": case.ranks,
        "objective": case.objective,
        "recompute": _recompute(case),
        "accumulation": case.accumulation,
        "parameters": found["parameters"],
        "sequences": case.configuration.batch,
        "length": case.configuration.length,
        "scored": scored,
        "planned_mib": {kind: round(value / MIB, 2) for kind, value in planned.items()},
        "measured_mib": {kind: round(measured[kind] / MIB, 2) for kind in planned},
        "of_measured": {kind: round(value / measured[kind], 4) for kind, value in planned.items() if measured[kind]},
        "rss_mib": round(found["rss_gib"] * 1024, 1),
    }


def _recompute(case: Case) -> str:
    return case.words[-1].partition("=")[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
