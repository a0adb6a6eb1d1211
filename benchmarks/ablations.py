"""Schedules, weights, clips, frequencies, block-size schedules on real text: the true bound and the variances of each.

    python -m benchmarks.ablations [--steps 150] [--seeds 1,2,3] [--only log_linear,edm] [--jobs 2] [--json FILE]

Each variant fine-tunes the same pretrained full-diffusion model (that of `./run.sh`; --init) with L' = 4, as in the
paper's tables, and is scored by the one bound, exactly, on the same held-out sequences. Variances are those of its own
schedule and weight at its last export. A run that has its result is not run again. On a GPU, raise --steps (the report
takes 1,000 to 10,000) and name a larger --recipe and --init.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

REFERENCE = "log_linear"
SCHEDULE, WEIGHT = "objective.schedule", "objective.weight"
VARIANTS: dict[str, list[str]] = {
    "log_linear": [],
    "square": [f"{SCHEDULE}.name=square"],
    "square_root": [f"{SCHEDULE}.name=square_root"],
    "logarithmic": [f"{SCHEDULE}.name=logarithmic"],
    "cosine": [f"{SCHEDULE}.name=cosine"],
    "clip 0.3-0.8": [f"{SCHEDULE}.t_min=0.3", f"{SCHEDULE}.t_max=0.8"],
    "clip 0.45-0.95": [f"{SCHEDULE}.t_min=0.45", f"{SCHEDULE}.t_max=0.95"],
    "gaussian": [f"{SCHEDULE}.name=gaussian"],
    "gaussian + defensive": [f"{SCHEDULE}.name=gaussian", f"{SCHEDULE}.defensive=0.2"],
    "bimodal": [f"{SCHEDULE}.name=bimodal", f"{SCHEDULE}.bimodal.mu2_end=0.85"],
    "grid search": [
        "objective.clip_search.method=grid",
        "objective.clip_search.every=50",
        "objective.clip_search.sequences=64",
    ],
    "moments search": ["objective.clip_search.method=moments", "objective.clip_search.every=25"],
    "edm": [f"{WEIGHT}.name=edm"],
    "iddpm": [f"{WEIGHT}.name=iddpm"],
    "sigmoid": [f"{WEIGHT}.name=sigmoid"],
    "fm": [f"{WEIGHT}.name=fm"],
    "simple": [f"{WEIGHT}.name=simple"],
    "clip 0.45-0.95 + edm": [f"{SCHEDULE}.t_min=0.45", f"{SCHEDULE}.t_max=0.95", f"{WEIGHT}.name=edm"],
    "frequency": ["objective.frequency.power=0.05", "objective.frequency.curriculum_steps=100"],
    "blocks 64 to 16 to 4": ["objective.block_schedule={0: [64], 50: [16], 100: [4]}"],
    # Four views cost the model of the docs recipes 2.95 times one by count of FLOPs (`model/flops.py`): at equal cost,
    # 51 steps of 150, or 5 (5.4) of a step's 16 texts.
    "views 4; fewer steps": [
        "objective.views=4",
        *(f"train.{key}=51" for key in ("total_steps", "checkpoint_every", "export_every")),
    ],
    "views 4; fewer texts": ["objective.views=4", "train.global_batch=5", "train.micro_batch=5"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="configs/recipes/docs_finetune.yaml")
    parser.add_argument("--init", default="runs/docs/pretrain", help="export or run that every variant starts from")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--only", help="names of variants, separated by commas")
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=128, help="held-out sequences scored")
    parser.add_argument("--batches", type=int, default=16, help="batches over which variances are taken")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one thread or GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(",")] if options.only else list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"--only {unknown[0]} is unknown; known: {', '.join(VARIANTS)}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    # Seed after seed, so that a table of fewer seeds is whole early.
    todo = [(name, seed) for seed in seeds for name in names]
    slots: Queue[int] = Queue()
    for slot in range(options.jobs):
        slots.put(slot)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda work: run(*work, slots, options), todo))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    reference = {result["seed"]: result["nelbo"] for result in results if result["variant"] == REFERENCE}
    summary = [summarise([result for result in results if result["variant"] == name], reference) for name in names]
    record = {"steps": options.steps, "seeds": seeds, "commit": commit, "summary": summary, "runs": results}
    print(json.dumps(record, indent=2))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(table(summary))
    return 0


def run(name: str, seed: int, slots: Queue[int], options: argparse.Namespace) -> dict[str, Any]:
    """Train one variant with one seed, score it, and take its variances, on a slot of its own."""
    slot = slots.get()
    try:
        return run_on(slot, name, seed, options)
    finally:
        slots.put(slot)


def run_on(slot: int, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """As `run`, on GPU number `slot` where there are GPUs."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    run_dir: Path = options.out / f"{slug}-{options.block_size}-{options.steps}-seed{seed}"
    result_file = run_dir / "result.json"
    if result_file.exists():
        saved: dict[str, Any] = json.loads(result_file.read_text())
        return saved
    train = [
        f"run_dir={run_dir}",
        f"train.init_from={options.init}",
        f"train.total_steps={options.steps}",
        f"train.checkpoint_every={options.steps}",
        f"train.export_every={options.steps}",
        "train.micro_batch=8",
        f"objective.block_size={options.block_size}",
        f"seed={seed}",
        f"data.shuffle_seed={seed}",
    ]
    own = {word.partition("=")[0] for word in VARIANTS[name]}  # a variant's value stands for the one above
    train = [word for word in train if word.partition("=")[0] not in own] + VARIANTS[name]
    program(slot, "train", options.recipe, *train)
    bound, noise = run_dir / "bound.json", run_dir / "variance.json"
    estimator = ["--estimator", "exact" if options.block_size <= 8 else "stratified", "--views", "8", "--batch", "60"]
    scoring = ["--sets", "valid", *estimator, "--max-chunks", str(options.chunks)]
    program(slot, "evaluate", str(run_dir), *scoring, "--json", str(bound))
    batches = ["--set", "valid", "--batches", str(options.batches), "--gradients", "--json", str(noise)]
    program(slot, "variance", str(run_dir), *batches)
    scored, varied = json.loads(bound.read_text())[0], json.loads(noise.read_text())[0]
    result = {
        "variant": name,
        "seed": seed,
        "nelbo": scored["nelbo"],
        "ppl": scored["ppl"],
        "tokens": scored["tokens"],
        "pack_hash": scored["pack_hash"],
        **{key: varied[key] for key in ("t_min", "t_max", "var_nelbo", "var_block", "var_gradient")},
    }
    result_file.write_text(json.dumps(result) + "\n")
    print(f"{name}, seed {seed}: ppl {result['ppl']:.2f}", file=sys.stderr, flush=True)
    return result


def program(slot: int, *words: str) -> None:
    """run.py in a process of its own, on one thread and at most one GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(slot)}
    done = subprocess.run([sys.executable, "run.py", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"run.py {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def summarise(results: list[dict[str, Any]], reference: dict[int, float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and those of the difference to the reference run of the same seed.

    A seed stands for one order of data and one stratification, so differences vary less than values.
    """
    row: dict[str, Any] = {"variant": results[0]["variant"], "n": len(results)}
    for result in results:
        result["difference"] = result["nelbo"] - reference.get(result["seed"], math.nan)
    for key in ("nelbo", "difference", "ppl", "var_nelbo", "var_block", "var_gradient"):
        values = [result[key] for result in results]
        row[key] = statistics.fmean(values)
        row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
    return row


def table(summary: list[dict[str, Any]]) -> str:
    """Markdown, in the order of the variants."""
    lines = [
        "| variant | n | bound (nats/token) | to log_linear | perplexity | Var. NELBO | of a block | of the gradient |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in summary:
        cells = [
            f"{row[key]:{form}} ± {row[f'{key}_std']:{spread}}"
            for key, form, spread in (
                ("nelbo", ".4f", ".4f"),
                ("difference", "+.4f", ".4f"),
                ("ppl", ".1f", ".1f"),
                ("var_nelbo", ".4f", ".4f"),
                ("var_block", ".2f", ".2f"),
                ("var_gradient", ".3g", ".1g"),
            )
        ]
        lines.append(f"| {row['variant']} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
