"""AR, L' = 16 and L' = L at equal training: the bound of each on held-out text, with its standard error.

    python -m benchmarks.block_sizes [--steps 600] [--out runs/block_sizes] [--json FILE]

Needs the packs of `./run.sh`. Prints JSON, and the table of docs/correctness.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

RECIPE = "configs/recipes/docs_finetune.yaml"
MODELS = {
    "AR": ["objective.name=ar", "objective.block_size=null"],
    "BD3-LM L' = 16": ["objective.block_size=16"],
    "BD3-LM L' = L": ["objective.block_size=null"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=256, help="held-out sequences evaluated")
    parser.add_argument("--out", type=Path, default=Path("runs/block_sizes"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for number, (name, words) in enumerate(MODELS.items()):
        run_dir = options.out / f"{number}-seed{options.seed}"
        train = [
            f"run_dir={run_dir}",
            "train.init_from=null",
            f"train.total_steps={options.steps}",
            f"seed={options.seed}",
        ]
        subprocess.run(["./run.sh", "train", RECIPE, *train, *words], check=True, stdout=sys.stderr)
        record = run_dir / "bound.json"
        scoring = ["--sets", "valid", "--views", "8", "--max-chunks", str(options.chunks), "--json", str(record)]
        subprocess.run(["./run.sh", "evaluate", str(run_dir), *scoring], check=True, stdout=sys.stderr)
        rows.append({"model": name, **json.loads(record.read_text())[0]})
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    result = {"steps": options.steps, "seed": options.seed, "commit": commit, "machine": machine, "rows": rows}
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n| model | nats per token | standard error | perplexity | estimator |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['model']} | {row['nelbo']:.4f} | {row['stderr']:.4f} | {row['ppl']:.1f} | {row['estimator']} |")


if __name__ == "__main__":
    main()
