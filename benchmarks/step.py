"""One training step against the `reference` variant, and against the floor, in one run.

    python -m benchmarks.step [--configurations a b c] [--objectives bd3 mdlm] [--precisions fp32 bf16]

Forward, backward, clip, AdamW and EMA. Ours is the step of a run (`ours.py`: DeepSpeed engine, noise, the sums for its
records), the reference is `reference.py`. Both are timed in turns; peak memory is that of a process of its own.
`floor_share` is the floor (`costs.py`) over our median. `reference_to_upstream` is the reference's forward, backward
and AdamW over the published code's time, scaled by the rates measured here (`upstream.py`).
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch

from bd3_ds.config.schema import MDLM
from bd3_ds.model.build import network_of
from benchmarks import costs, measure, ours, reference, upstream


def main(argv: list[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--configurations", nargs="+", choices=ours.CONFIGURATIONS, default=list(ours.CONFIGURATIONS))
    parser.add_argument("--objectives", nargs="+", choices=("bd3", "mdlm"), default=["bd3"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    options = parser.parse_args(argv)
    results = []
    for name in options.configurations:
        for objective in options.objectives:
            for precision in options.precisions:
                case = {"configuration": name, "objective": objective, "precision": precision}
                measure.say(str(case))
                found = measure.in_child("benchmarks.step:compare", {**case, "repeats": options.repeats})
                if not options.no_memory:
                    found["peak_memory_gib"] = {
                        variant: measure.in_child("benchmarks.step:peak_memory", {**case, "variant": variant})
                        for variant in ("ours", "reference")
                    }
                measure.say(f"  {found['speedup']:.2f} x, {found['floor_share']:.0%} of the floor")
                results.append({**case, **found})
    measure.finish("step", options, results, options.json)
    return 0


def compare(configuration: str, objective: str, precision: str, repeats: int) -> dict[str, Any]:
    """Times, ratio and floor of one case."""
    given = ours.CONFIGURATIONS[configuration]
    run = ours.make_run(given, objective, precision)
    network = network_of(run.model, objective)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    step = ours.make_step(run)
    size = given.length if objective == MDLM else given.block_size
    stages: dict[str, list[float]] = {}
    steps = {"ours": step, "reference": make_reference(configuration, objective, precision, stages)}
    seconds = measure.interleaved(steps, repeats)
    result = step()
    counted = costs.products(network, objective, given.length, size, given.batch, result.masked_share)
    model = sum(network_parameters(configuration, objective))
    least = costs.floor(counted, model, dtype)
    times = {name: measure.summary(values) for name, values in seconds.items()}
    tokens = given.length * given.batch
    part = sum(statistics.median(stages[stage][1:]) for stage in ("forward", "backward", "adamw"))
    rates = costs.ceilings(dtype)
    expected = upstream.scaled_seconds(configuration, objective, precision, rates)
    return {
        "seconds": times,
        "tokens_per_s": {name: measure.rate(tokens, value) for name, value in times.items()},
        "speedup": times["reference"]["median"] / times["ours"]["median"],
        "floor": least,
        "floor_share": least["total_seconds"] / times["ours"]["median"],
        "reference_stages": {stage: statistics.median(values[1:]) for stage, values in stages.items()},
        "reference_to_upstream": part / expected,
        "ceilings": rates,
    }


def make_reference(configuration: str, objective: str, precision: str, stages: dict[str, list[float]]) -> Any:
    """The reference step of a case."""
    given = ours.CONFIGURATIONS[configuration]
    run = ours.make_run(given, objective, precision)
    model = run.model
    network = reference.Reference(
        given.vocab, model.hidden_size, model.layers, model.heads, model.cond_size, model.dropout
    )
    size = given.length if objective == MDLM else given.block_size
    return reference.make_step(network, given.length, given.batch, size, precision == "bf16", stages)


def network_parameters(configuration: str, objective: str) -> list[int]:
    """Numbers of each parameter."""
    from bd3_ds.model.dit import DiT

    run = ours.make_run(ours.CONFIGURATIONS[configuration], objective, "fp32")
    with torch.device("meta"):
        return [p.numel() for p in DiT(network_of(run.model, objective)).parameters()]


def peak_memory(configuration: str, objective: str, precision: str, variant: str) -> float:
    """GiB resident at most in two steps of one variant; for a process of its own."""
    if variant == "ours":
        step: Any = ours.make_step(ours.make_run(ours.CONFIGURATIONS[configuration], objective, precision))
    else:
        step = make_reference(configuration, objective, precision, {})
    for _ in range(2):
        step()
    return measure.peak_rss_gb()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
