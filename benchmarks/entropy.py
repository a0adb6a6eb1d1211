"""A source of known entropy: do trained models' bounds approach its entropy rate from above, and never pass it?

    OMP_NUM_THREADS=1 python -m benchmarks.entropy [--steps 600] [--seeds 1,2] [--models ar,1,4,16] [key=value …]

Makes packs of a Markov chain of 16 symbols (length 64), trains an autoregressive model and BD3-LMs of the given block
sizes on one CPU rank each, minutes a model, and scores the exports at a quarter, half and all of the steps on held-out
text: the likelihood itself for `ar` and L' = 1, all masks for L' <= 4, strata for larger blocks. key=value words change
the models' recipe. Asked again it trains only what is missing.

The judged figure is the paired gap, a model's bound less the source's own -log p of the same text. Prints JSON and a
Markdown table; the exit code is 1 if a gap lies more than three standard errors below zero.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

import bd3_ds
from bd3_ds.checkpoint.export import export_name
from bd3_ds.data.pack import open_pack
from bd3_ds.data.synthetic import MarkovSource
from bd3_ds.runtime.errors import run_command
from bd3_ds.runtime.run_dir import EXPORTS
from data_prep import synthetic
from tests.helpers.launch import train

SYMBOLS, LENGTH = 16, 64
TRAIN_CHUNKS, HELD_OUT_CHUNKS = 16384, 1024  # a million tokens for the 240 free numbers of the source: no overfitting
EXACT_UP_TO = 4  # block size with all masks; larger blocks are stratified
SIGNIFICANT = 3.0  # standard errors
ROUNDING = 1e-6  # nats per token that fp32 log-probabilities may be off
PATIENCE = 6 * 3600.0  # seconds for one model
COLUMNS = ("model", "seed", "step", "bound", "entropy rate", "bound - NLL", "standard error", "errors", "estimator")

RECIPE = """\
model: {{hidden_size: 128, layers: 2, heads: 2, cond_size: 32, dropout: 0.0}}
data: {{train: {pack}, length: {length}}}
objective: {{name: bd3}}
optim: {{lr: 1.0e-3, beta2: 0.98, warmup_steps: 30, ema_decay: 0.98}}
train: {{precision: fp32, total_steps: {steps}, global_batch: 32, micro_batch: 32, checkpoint_every: 1000000,
  export_every: {every}}}
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="a multiple of 4")
    parser.add_argument("--seeds", default="1", help="of the models, with commas between")
    parser.add_argument("--models", default="ar,1,4,16", help="ar or block sizes, with commas between")
    parser.add_argument("--source-seed", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=512, help=f"held-out sequences, at most {HELD_OUT_CHUNKS}")
    parser.add_argument("--views", type=int, default=32, help="a sequence, where the bound is stratified")
    parser.add_argument("--out", type=Path, default=Path("runs/entropy"))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("words", nargs="*", metavar="key=value", help="recipe words for every model")
    options = parser.parse_intermixed_args(argv)
    if options.steps < 4 or options.steps % 4:
        parser.error("--steps must be a multiple of 4")
    if not 2 <= options.chunks <= HELD_OUT_CHUNKS:
        parser.error(f"--chunks must be 2 to {HELD_OUT_CHUNKS}")
    out = options.out.resolve()
    make_pack(out / "train", options.source_seed, TRAIN_CHUNKS, part=0)
    make_pack(out / "valid", options.source_seed, HELD_OUT_CHUNKS, part=1)
    valid = open_pack(out / "valid")
    source = MarkovSource.of(valid.manifest.settings)
    tokens = valid.all_tokens(options.chunks)
    truth = source.nll(tokens)
    recipe = out / "recipe.yaml"
    every = options.steps // 4
    recipe.write_text(RECIPE.format(pack=out / "train", length=LENGTH, steps=options.steps, every=every))
    rows = []
    for seed in map(int, options.seeds.split(",")):
        for model in options.models.split(","):
            run_dir = out / f"{model}-seed{seed}"
            start = time.perf_counter()
            train(
                recipe,
                f"run_dir={run_dir}",
                f"seed={seed}",
                *objective(model),
                *options.words,
                ranks=1,
                timeout=PATIENCE,
            )
            print(f"{name(model)}, seed {seed}: trained in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            for step in (every, 2 * every, options.steps):
                row = score(run_dir / EXPORTS / export_name(step), tokens, truth, options.views)
                rows.append({"model": name(model), "seed": seed, "step": step, **row})
                print(f"  step {step}: gap {row['gap']:.4f} +- {row['stderr']:.4f}", file=sys.stderr)
    scored = tokens.shape[1] - 1
    result = {
        "entropy_rate": source.entropy_rate,
        "truth": float(truth.mean()) / scored,
        "truth_stderr": stderr_of_mean(truth / scored),
        "sequences": len(tokens),
        "tokens": len(tokens) * scored,
        "source": valid.manifest.settings,
        "pack_hash": valid.manifest.pack_hash,
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n" + table(result))
    return int(any(row["below"] for row in rows))


def make_pack(directory: Path, seed: int, chunks: int, part: int) -> None:
    """A pack of the source by its own command; one that is there stays."""
    words = f"--symbols {SYMBOLS} --length {LENGTH} --chunks {chunks} --seed {seed} --part {part} --out"
    with redirect_stdout(sys.stderr):  # stdout is for the results
        synthetic.main([*words.split(), str(directory)])


def name(model: str) -> str:
    """`ar` or a block size as the table has it."""
    return "AR" if model == "ar" else f"BD3-LM L' = {model}"


def objective(model: str) -> list[str]:
    """Recipe words of `ar` or a block size."""
    return ["objective.name=ar", "objective.block_size=null"] if model == "ar" else [f"objective.block_size={model}"]


def score(export: Path, tokens: np.ndarray, truth: np.ndarray, views: int) -> dict[str, Any]:
    """The judgement of an export on tokens [N, L] whose true -log p is `truth` [N] nats, and how it was scored."""
    model = bd3_ds.load(str(export))
    estimator = "exact" if model.block_size <= EXACT_UP_TO else "stratified"
    result = model.score(tokens.tolist(), estimator, views=views)
    return {
        "estimator": estimator if estimator == "exact" else f"stratified, {views} views",
        **judge(result.nelbo.sum(1).cpu().numpy(), truth, tokens.shape[1] - 1, result.stderr.cpu().numpy()),
    }


def judge(bound: np.ndarray, truth: np.ndarray, scored: int, estimator_stderr: np.ndarray) -> dict[str, Any]:
    """Whether bounds lie above the truth of the same text, as far as N sequences can tell.

    bound and truth [N]: nats of a sequence's `scored` tokens. estimator_stderr [N]: the estimator's own error in each
    bound. Returned figures are nats per scored token; `errors` is the gap in standard errors.
    """
    gaps = (bound - truth) / scored
    # The estimator draws anew for each sequence, so the spread of the gaps already holds its error; its share is
    # reported but not added a second time.
    gap, stderr = float(gaps.mean()), stderr_of_mean(gaps)
    return {
        "bound": float(bound.mean()) / scored,
        "truth": float(truth.mean()) / scored,
        "gap": gap,
        "stderr": stderr,
        "estimator_stderr": float(np.sqrt((estimator_stderr**2).sum())) / len(bound) / scored,
        "errors": gap / stderr if stderr > 0 else None,
        "below": gap < -SIGNIFICANT * stderr - ROUNDING,
    }


def stderr_of_mean(values: np.ndarray) -> float:
    """Of independent values [N]."""
    return float(values.std(ddof=1)) / len(values) ** 0.5


def table(result: dict[str, Any]) -> str:
    """Nats per token; `errors` is the gap in standard errors."""
    lines = [
        f"Entropy rate {result['entropy_rate']:.5f} nats per token; the source's own NLL of the {result['tokens']} "
        f"held-out tokens {result['truth']:.5f} +- {result['truth_stderr']:.5f}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for row in result["rows"]:
        errors = "-" if row["errors"] is None else f"{row['errors']:+.1f}"
        lines.append(
            f"| {row['model']} | {row['seed']} | {row['step']} | {row['bound']:.4f} | {result['entropy_rate']:.4f} "
            f"| {row['gap']:+.5f} | {row['stderr']:.5f} | {errors}{' BELOW' if row['below'] else ''} "
            f"| {row['estimator']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
