"""Every ZeRO stage, with and without offloading, in fp32 and bf16 on two ranks against one rank: one recipe, one table.

    python -m benchmarks.zero_matrix [--steps 50] [--data PACK] [--json FILE]

Each run on two ranks is asked to stop half-way (SIGTERM), saves, and the same command continues it to the end. Prints a
Markdown table; the JSON holds the curves as well. Losses are nats per scored token of the same sequences under the same
noise, so that curves may be compared step by step.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_ds.data.manifest import read_manifest
from tests.helpers.launch import curve, start_training, stop, train, train_records, wait_for_step
from tests.helpers.tiny import tiny_pack

DOCS = Path("runs/docs/data/train")


@dataclass(frozen=True)
class Case:
    """One run: its precision, ranks and file of ds_configs, and whether it is stopped half-way and continued."""

    precision: str
    ranks: int
    ds_config: str
    resumes: bool = True


FILES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# The first of each precision is its reference.
CASES = [
    case
    for precision in ("fp32", "bf16")
    for case in (Case(precision, 1, "zero0", resumes=False), *(Case(precision, 2, name) for name in FILES))
]
COLUMNS = (
    "precision",
    "ranks",
    "ds_configs",
    "resumed after",
    "final loss",
    "loss difference",
    "norm difference",
    "s/step",
    "seconds",
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, help=f"a pack; default: {DOCS}, or a tiny one where that is absent")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(Path(scratch), arguments.data, arguments.steps, arguments.seed)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


def measure(scratch: Path, data: Path | None, steps: int, seed: int, cases: list[Case] = CASES) -> list[dict[str, Any]]:
    """One dictionary a run, in the order of the table."""
    if data is None:
        data = DOCS if DOCS.is_dir() else tiny_pack(scratch / "pack", length=64, chunks=256)
    recipe = scratch / "recipe.yaml"
    recipe.write_text(
        f"seed: {seed}\n"
        "model: {hidden_size: 96, layers: 3, heads: 3, cond_size: 32, dropout: 0.0}\n"
        f"data: {{train: {data.resolve()}, length: {read_manifest(data).length}}}\n"
        "objective: {name: bd3, block_size: 16}\n"
        "optim: {lr: 1.0e-3, warmup_steps: 10}\n"
        f"train: {{total_steps: {steps}, global_batch: 8, log_every: 1, "
        "checkpoint_every: 1000000, export_every: 1000000}\n"
    )
    results = []
    for case in cases:
        run_dir = scratch / f"{case.precision}-{case.ranks}-{case.ds_config}"
        words = (f"run_dir={run_dir}", f"train.precision={case.precision}", f"train.micro_batch={4 // case.ranks}")
        start = time.perf_counter()
        saved = stop_at(steps // 2, case, recipe, *words, run_dir=run_dir) if case.resumes else None
        said = train(recipe, *words, ranks=case.ranks, ds_config=case.ds_config)
        assert saved is None or f"continuing {run_dir} after step {saved}" in said
        results.append(
            {
                "precision": case.precision,
                "ds_config": case.ds_config,
                "ranks": case.ranks,
                "resumed_after": saved,
                "loss": [loss for loss, _ in curve(run_dir).values()],
                "grad_norm": [norm for _, norm in curve(run_dir).values()],
                "seconds_per_step": statistics.median(line["seconds"] for line in train_records(run_dir)),
                "seconds": time.perf_counter() - start,
            }
        )
        assert len(results[-1]["loss"]) == steps
        print(f"{case.precision} {case.ds_config} on {case.ranks}: {results[-1]['loss'][-1]:.6f}", file=sys.stderr)
    for result in results:
        reference = next(other for other in results if other["precision"] == result["precision"])
        result["final_loss"] = result["loss"][-1]
        result["max_loss_difference"] = distance(result["loss"], reference["loss"])
        ratios = [ours / theirs for ours, theirs in zip(result["grad_norm"], reference["grad_norm"], strict=True)]
        result["max_norm_difference"] = distance(ratios, [1.0] * steps)
    return results


def stop_at(step: int, case: Case, recipe: Path, *words: str, run_dir: Path) -> int:
    """Start the run, ask it to stop once `step` is on record, and return the step after which it saved."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with start_training(recipe, *words, ranks=case.ranks, ds_config=case.ds_config, **quiet) as run:
        wait_for_step(run_dir, step, run)
        stop(run, signal.SIGTERM)
    assert not (run_dir / "records" / "finished.json").exists(), f"{run_dir} was done before it could be stopped"
    (saved,) = (run_dir / "checkpoints").glob("step-*/manifest.json")
    return int(saved.parent.name.removeprefix("step-"))


def distance(ours: list[float], theirs: list[float]) -> float:
    """Largest |difference| over all steps."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def table(results: list[dict[str, Any]]) -> str:
    """Largest differences to the first row of the same precision over all steps; those of the norms are relative."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in results:
        lines.append(
            f"| {r['precision']} | {r['ranks']} | {r['ds_config']} | {r['resumed_after'] or '-'} "
            f"| {r['final_loss']:.6f} | {r['max_loss_difference']:.1e} | {r['max_norm_difference']:.1e} "
            f"| {r['seconds_per_step']:.3f} | {r['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
