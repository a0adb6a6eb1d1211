"""What a bound costs: forward passes until its standard error is 0.5% of it, by estimator, for a model and a text.

    python -m benchmarks.estimators EXPORT [EXPORT …] --pack DIR [--chunks 64] [--error 0.005] [--json FILE]

On the first sequences of the pack each sampled estimator is run with several numbers of views K and seeds. Its own
standard error and, where the exact value is known (L' <= 8), its root mean square error over seeds are shown beside
each other. `forwards needed` is what a standard error of --error takes on this text, K * (error at K / --error)^2 views
of each sequence, as independent views have it; strata do better with more views, so read the row nearest to the goal.
Clean passes are counted, one a sequence.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bd3_ds
from bd3_ds.data.pack import open_pack

VIEWS = (2, 4, 8, 16)
COLUMNS = ("model", "estimator", "views", "standard error", "error over seeds", "forwards for it", "forwards needed")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="+", metavar="EXPORT")
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--error", type=float, default=0.005, help="standard error wanted, as a share of the bound")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    tokens = torch.from_numpy(open_pack(options.pack).all_tokens(options.chunks))
    rows = [row for export in options.exports for row in measure(export, tokens, options.error, options.seeds)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {"pack": str(options.pack), "chunks": len(tokens), "error": options.error, "commit": commit, "rows": rows}
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))
    return 0


def measure(export: str, tokens: torch.Tensor, wanted: float, seeds: int) -> list[dict[str, Any]]:
    """One row an estimator and number of views; errors as shares of the bound."""
    model = bd3_ds.load(export)
    size, chunks = model.block_size, len(tokens)
    rows: list[dict[str, Any]] = []
    reference, known = 0.0, size <= 8
    if known:
        exact = model.score(tokens, estimator="exact")
        reference = float(exact.nelbo.sum())
        rows.append(row(size, "exact", 2**size - 1, 0.0, 0.0, exact.forwards, exact.forwards))
    else:
        reference = float(model.score(tokens, estimator="stratified", views=64, seed=10_000).nelbo.sum())
    for estimator in ("stratified", "mc"):
        for views in VIEWS:
            scores = [model.score(tokens, estimator=estimator, views=views, seed=seed) for seed in range(seeds)]
            variance = np.mean([float(score.stderr.square().sum()) for score in scores])
            stderr = math.sqrt(variance) / reference
            totals = np.array([float(score.nelbo.sum()) for score in scores])
            spread = math.sqrt(np.mean((totals / reference - 1) ** 2)) if known else totals.std(ddof=1) / reference
            needed = chunks * (1 + math.ceil(views * (stderr / wanted) ** 2))
            rows.append(row(size, estimator, views, stderr, spread, scores[0].forwards, needed))
            print(f"L' = {size}, {estimator}, {views} views: {stderr:.3%}", file=sys.stderr, flush=True)
    return rows


def row(
    size: int, estimator: str, views: int, stderr: float, spread: float, forwards: int, needed: int
) -> dict[str, Any]:
    return {
        "block_size": size,
        "estimator": estimator,
        "views": views,
        "stderr": stderr,
        "error_over_seeds": spread,
        "forwards": forwards,
        "needed": needed,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; errors in per cent of the bound."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += [
        f"| L' = {r['block_size']} | {r['estimator']} | {r['views']} | {r['stderr']:.3%} | {r['error_over_seeds']:.3%} "
        f"| {r['forwards']:,} | {r['needed']:,} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
