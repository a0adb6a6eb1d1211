"""The closing table of `./run.sh`: what each run reached, beside the unigram perplexity of the same text.

`run.py summary RUN_DIR …`
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from bd3_ds.config.load import load_resolved
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import RunConfig, block_size
from bd3_ds.data.remote import fetch_facts
from bd3_ds.evaluation import figures
from bd3_ds.evaluation.unigram import unigram_perplexity
from bd3_ds.runtime import records
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.run_dir import EVALUATIONS, RUN_YAML, TRAIN_RECORDS, is_run
from bd3_ds.runtime.tables import console_table

LAST = 20  # steps whose mean is called the train loss; a single step's is a noisy draw


def main(argv: list[str]) -> int:
    """Print the table for these runs, one column each."""
    if not argv:
        raise UserError("give one run directory or more, such as runs/docs/pretrain")
    columns = [column(Path(place)) for place in argv]
    rows: list[str] = list(dict.fromkeys(key for values in columns for key in values))
    print(console_table((), ((row, *(values.get(row, "-") for values in columns)) for row in rows)))
    return 0


def column(run_dir: Path) -> dict[str, str]:
    """Row name to text for one run."""
    if not is_run(run_dir):
        raise UserError(f"{run_dir} is not a run (it has no run.yaml)")
    run = load_resolved(run_dir / RUN_YAML)
    steps = records.read(run_dir / TRAIN_RECORDS)
    if not steps:
        raise UserError(f"{run_dir} has no training records yet; train it first")
    per_step = run.train.global_batch * run.data.length
    blocks = f", {block_size(run)}" if OBJECTIVES[run.objective.name].has_blocks else ""
    values = {
        "run": run_dir.name,
        "objective, block size": run.objective.name + blocks,
        "steps, tokens": f"{steps[-1]['step']:,}, {steps[-1]['tokens']:,}",
        f"train loss (nats, last {LAST})": f"{statistics.fmean(line['loss'] for line in steps[-LAST:]):.3f}",
        "tokens/s": f"{per_step / statistics.median(line['seconds'] for line in steps):,.0f}",
    }
    final = [line for line in records.read(run_dir / EVALUATIONS) if line["step"] == steps[-1]["step"]]
    for name, pack in run.eval.sets.items():
        line = next((line for line in final if line["set"] == name), None)
        if line is not None:
            values |= _perplexities(run, name, pack, line)
    values["sets evaluated"] = str(len(final))
    return values


def _perplexities(run: RunConfig, name: str, pack: str, line: dict[str, Any]) -> dict[str, str]:
    taken = line.get("chunks", run.eval.max_chunks)  # the same text, whoever scored it
    unigram = unigram_perplexity(fetch_facts(run.data.train, run.data.cache), pack, taken)
    error = line["ppl"] * line["stderr"]
    kind = "held-out" if name == "valid" else "zero-shot"
    assert math.isfinite(error)
    return {
        f"{kind} perplexity: {name}": f"{line['ppl']:.1f} +- {error:.1f}",
        f"  unigram perplexity: {name}": f"{unigram:.1f}",
        f"  sequences, estimator: {name}": f"{figures.sequences(line)}, {figures.estimator(line)}".removeprefix(", "),
    }
