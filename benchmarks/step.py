"""One training step against the `reference` variant, and against the floor, in one run.

    python -m benchmarks.step [--configurations a b c] [--objectives bd3 mdlm] [--precisions fp32 bf16]

Forward, backward, clip, AdamW and EMA. Ours is the step of a run (`ours.py`: DeepSpeed engine, noise, the sums for its
records), the reference is `reference.py`. Each has a process of its own, which also gives its peak memory; they take
steps in turn.
`floor_share` is the floor (`costs.py`) over our median. `reference_to_upstream` is the reference's forward, backward
and AdamW over the published code's time, scaled by the rates measured here (`upstream.py`).
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.model.build import dit_config
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.allocator import keep_freed_memory
from benchmarks import costs, measure, ours, reference, upstream


def main(argv: list[str]) -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--configurations", nargs="+", choices=ours.CONFIGURATIONS, default=list(ours.CONFIGURATIONS))
    parser.add_argument("--objectives", nargs="+", choices=("bd3", "mdlm"), default=["bd3"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--kept", action="store_true", help="also a reference that keeps freed memory, as ours does")
    options = parser.parse_args(argv)
    results = []
    for name in options.configurations:
        for objective in options.objectives:
            for precision in options.precisions:
                case = {"configuration": name, "objective": objective, "precision": precision}
                measure.say(str(case))
                found = compare(**case, repeats=options.repeats, kept=options.kept)
                measure.say(f"  {found['speedup']:.2f} x, {found['floor_share']:.0%} of the floor")
                results.append({**case, **found})
    measure.finish("step", options, results, options.json)
    return 0


def compare(configuration: str, objective: str, precision: str, repeats: int, kept: bool = False) -> dict[str, Any]:
    """Times, memory, ratio and floor of one case: a process for each variant, one step in turn."""
    case = (configuration, objective, precision)
    names = ["ours", "reference", *(["reference_kept"] if kept else [])]
    with ExitStack() as stack:
        processes = {name: stack.enter_context(measure.Process()) for name in names}
        for name, process in processes.items():
            process.call(prepare, name, *case)
        runs = measure.interleaved({name: partial(p.call, run) for name, p in processes.items()}, repeats)
        times = {name: measure.summary(values) for name, values in runs.items()}
        memory = {name: process.call(measure.peak_rss_gb) for name, process in processes.items()}
        masked = processes["ours"].call(masked_share)
        stages = processes["reference"].call(reference_stages)
    with measure.Process() as quiet:
        least, rates = quiet.call(floor, *case, masked)
    tokens = ours.CONFIGURATIONS[configuration].length * ours.CONFIGURATIONS[configuration].batch
    part = sum(stages[stage] for stage in ("forward", "backward", "adamw"))
    return {
        "seconds": times,
        "tokens_per_s": {name: measure.rate(tokens, value) for name, value in times.items()},
        "speedup": times["reference"]["median"] / times["ours"]["median"],
        "peak_memory_gib": memory,
        "memory_ratio": memory["ours"] / memory["reference"],
        "floor": least,
        "floor_share": least["total_seconds"] / times["ours"]["median"],
        "reference_stages": stages,
        "reference_to_upstream": part / upstream.scaled_seconds(*case, rates),
        "ceilings": rates,
    }


# What follows runs in a variant's process, which keeps its step from call to call.
_state: dict[str, Any] = {}


def prepare(variant: str, configuration: str, objective: str, precision: str) -> None:
    """Build a variant's step."""
    if variant == "ours":
        _state["step"] = ours.make_step(ours.make_run(ours.CONFIGURATIONS[configuration], objective, precision))
    else:
        if variant == "reference_kept":
            keep_freed_memory()
        _state["stages"] = {}
        _state["step"] = make_reference(configuration, objective, precision, _state["stages"])


def run() -> None:
    """One step."""
    _state["result"] = _state["step"]()


def masked_share() -> float:
    """Of the scored tokens of our last step."""
    return float(_state["result"].masked_share)


def reference_stages() -> dict[str, float]:
    """Median seconds of the reference's stages, without its first step."""
    return {stage: statistics.median(values[1:]) for stage, values in _state["stages"].items()}


def floor(configuration: str, objective: str, precision: str, masked: float) -> tuple[dict[str, Any], dict[str, float]]:
    """The floor of a case and this machine's ceilings, measured now."""
    given = ours.CONFIGURATIONS[configuration]
    network = dit_config(ours.make_run(given, objective, precision).model, objective)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = OBJECTIVES[objective].block_size(given.block_size, given.length)
    counted = costs.products(network, objective, given.length, size, given.batch, masked)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiT(network).parameters())
    keep_freed_memory()
    return costs.floor(counted, parameters, dtype), costs.ceilings(dtype)


def make_reference(configuration: str, objective: str, precision: str, stages: dict[str, list[float]]) -> Any:
    """The reference step of a case."""
    given = ours.CONFIGURATIONS[configuration]
    run = ours.make_run(given, objective, precision)
    model = run.model
    network = reference.Reference(
        given.vocab, model.hidden_size, model.layers, model.heads, model.cond_size, model.dropout
    )
    size = OBJECTIVES[objective].block_size(given.block_size, given.length)
    return reference.make_step(network, given.length, given.batch, size, precision == "bf16", stages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
