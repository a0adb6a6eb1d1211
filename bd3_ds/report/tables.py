"""Records as rows: Markdown for people, CSV at full precision for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from bd3_ds.report.collect import RunRecords, differences, is_bound
from bd3_ds.runtime.tables import markdown_table

Row = Sequence[Any]

SHOWN = 8  # differing keys of a run in the Markdown table

RUN_COLUMNS = (
    "run", "objective", "block_size", "steps", "samples", "tokens", "train_nelbo", "tokens_per_second", "seconds",
    "differs",
)  # fmt: skip
EVALUATION_COLUMNS = (
    "run", "export", "step", "set", "estimator", "nelbo", "stderr", "ppl", "ppl_stderr", "tokens", "pack_hash",
)  # fmt: skip


def run_rows(runs: list[RunRecords]) -> list[Row]:
    """One row of RUN_COLUMNS a run; `train_nelbo` is the mean over the last tenth of the steps.

    It is nan where no step estimates the bound. `differs`: every key=value in which the runs' configurations differ.
    """
    rows: list[Row] = []
    for run, differing in zip(runs, differences(runs), strict=True):
        last = run.train[-1] if run.train else {"step": 0, "samples": 0, "tokens": 0}
        seconds = sum(line["seconds"] for line in run.train)
        counts = (last["step"], last["samples"], last["tokens"])
        rows.append(
            (
                run.name,
                run.objective,
                run.block_size,
                *counts,
                run.final_nelbo(),
                run.tokens_per_second(),
                seconds,
                " ".join(_assignments(differing)),
            )
        )
    return rows


def evaluation_rows(runs: list[RunRecords]) -> list[Row]:
    """One row of EVALUATION_COLUMNS for each evaluation of each run; ppl_stderr = ppl * stderr (first order)."""
    return [_evaluation_row(run, line) for run in runs for line in run.evaluations]


def csv_text(columns: Row, rows: Sequence[Row]) -> str:
    """CSV with a header; floats with full precision, None as an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


def runs_table(runs: list[RunRecords]) -> str:
    """What was trained, and what differs between the runs, in Markdown."""
    rows = []
    for run, row, differing in zip(runs, run_rows(runs), differences(runs), strict=True):
        nelbo = f"{row[6]:.4f}" if math.isfinite(row[6]) else _why_no_nelbo(run)
        rate = f"{row[7]:,.0f}" if math.isfinite(row[7]) else "-"
        cells = (run.name, _objective(run), f"{row[3]:,}", f"{row[5]:,}", nelbo, rate, f"{row[8] / 3600:.2f}")
        rows.append((*cells, _shortened(_assignments(differing))) if len(runs) > 1 else cells)
    columns = ("run", "objective", "steps", "tokens", "train NELBO", "tokens/s", "hours")
    return markdown_table((*columns, "differs in") if len(runs) > 1 else columns, rows)


def perplexity_table(runs: list[RunRecords]) -> str:
    """The newest perplexity of every run on every set, in Markdown, best first in each set."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.sets):
        newest = [(run, line) for run in runs for line in run.newest() if line["set"] == name]
        for run, line in sorted(newest, key=lambda pair: float(pair[1]["nelbo"])):
            rows.append(
                (
                    name,
                    run.name,
                    f"{line['step']:,}",
                    f"{line['ppl']:.2f} ± {line['ppl'] * line['stderr']:.2f}",
                    f"{line['nelbo']:.4f} ± {line['stderr']:.4f}",
                    line["estimator"],
                    f"{line['tokens']:,}",
                    line["pack_hash"][:8],
                )
            )
    return markdown_table(("set", "run", "step", "ppl", "NELBO", "estimator", "tokens", "pack"), rows)


def warnings(runs: list[RunRecords]) -> list[str]:
    """Sets on which the runs' perplexities are not of the same text, and so not comparable."""
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.sets):
        lines = [line for run in runs for line in run.newest() if line["set"] == name]
        # Records made before there were two hashes have that of the tokens alone, under the name pack_hash.
        key = "pack_hash" if all("content_hash" in line for line in lines) else "content_hash"
        texts = {(line.get(key, line["pack_hash"]), line["tokens"]) for line in lines}
        if len(texts) > 1:
            found.append(f"{name}: the runs were scored on different text (pack or tokens differ); do not compare them")
    return found


def _evaluation_row(run: RunRecords, line: dict[str, Any]) -> Row:
    values = {**line, "run": run.name, "ppl_stderr": line["ppl"] * line["stderr"]}
    return [values[column] for column in EVALUATION_COLUMNS]


def _why_no_nelbo(run: RunRecords) -> str:
    if not run.train:
        return "-"
    return "not finite" if any(is_bound(line) for line in run.final_steps()) else "no bound"


def _assignments(values: dict[str, Any]) -> list[str]:
    """key=value words."""
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def _shortened(words: list[str]) -> str:
    """As many words as a table has room for; runs.csv has all."""
    rest = len(words) - SHOWN
    return " ".join(words[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _objective(run: RunRecords) -> str:
    size = f", L' = {run.block_size}" if run.block_size else ""
    return f"{run.objective or 'unknown'}{size}"
