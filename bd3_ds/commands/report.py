"""`run.py report RUN_DIR …`: what runs have come to, as Markdown, CSV and plots."""

from __future__ import annotations

from pathlib import Path

from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.files import require_writable, write_text


def main(argv: list[str]) -> int:
    """Write report.md, runs.csv, evaluations.csv and the plots, and print the Markdown."""
    parser = Parser(prog="run.py report", description="Tables and plots of one run, or of several side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: report/ in the first RUN_DIR")
    parser.add_argument("--x", choices=("steps", "tokens", "seconds"), default="steps", help="axis of the curves")
    options = parser.parse(argv)

    from bd3_ds.report.collect import REPORT, collect

    runs = collect(options.runs, options.out)
    out = options.out or runs[0].path / "report"
    require_writable(out)

    from bd3_ds.report import curves, tables

    write_text(out / "runs.csv", tables.csv_text(tables.RUN_COLUMNS, tables.run_rows(runs)))
    write_text(out / "evaluations.csv", tables.csv_text(tables.EVALUATION_COLUMNS, tables.evaluation_rows(runs)))
    plots = []
    if any(run.has_bound for run in runs):
        curves.plot_bound(runs, out / "loss.png", options.x)
        plots.append(("training", "loss.png"))
    if any(run.train and not run.has_bound for run in runs):
        curves.plot_loss(runs, out / "no_bound.png", options.x)
        plots.append(("training loss of runs without a bound", "no_bound.png"))
    for name in dict.fromkeys(name for run in runs for name in run.sets):
        curves.plot_perplexity(runs, name, out / curves.file_name(name), options.x)
        plots.append((name, curves.file_name(name)))

    parts = ["# Report", tables.runs_table(runs)]
    if any(run.evaluations for run in runs):
        parts += ["## Perplexity of the newest exports", tables.perplexity_table(runs)]
    parts += [f"Warning: {sentence}." for sentence in tables.warnings(runs)]
    parts += ["## Curves", *(f"![{title}]({file})" for title, file in plots)]
    text = "\n\n".join(parts) + "\n"
    write_text(out / REPORT, text)
    print(text, end="")
    print(f"\nwritten to {out}")
    return 0
