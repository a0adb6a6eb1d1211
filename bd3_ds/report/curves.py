"""Plots of what runs have recorded, as PNG; no display and no global state."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from bd3_ds.report.collect import AXES, RunRecords, is_bound

SMOOTHED_OVER = 50  # a curve is smoothed over about this part of its steps: steps / 50


def plot_bound(runs: list[RunRecords], path: Path, axis: str = "steps") -> None:
    """Training NELBO in nats per token, of the steps that estimate the bound: each pale, their running mean strong.

    Runs whose steps do not estimate it (a clipped interval, masking by frequency) have no curve here.
    """
    figure, axes = _figure("training", "NELBO (nats per token)", axis)
    for number, run in enumerate(runs):
        lines = [line for line in run.train if is_bound(line)]
        if lines:
            _curve(axes, run, lines, "nelbo", axis, number)
    _save(figure, axes, path)


def plot_loss(runs: list[RunRecords], path: Path, axis: str = "steps") -> None:
    """Weighted training loss of the runs of which no step estimates the bound; each has a scale of its own."""
    figure, axes = _figure("training without a bound", "weighted loss (nats per token), no bound", axis)
    for number, run in enumerate(runs):
        if run.train and not run.has_bound:
            _curve(axes, run, run.train, "loss", axis, number)
    _save(figure, axes, path)


def plot_perplexity(runs: list[RunRecords], set_name: str, path: Path, axis: str = "steps") -> None:
    """Perplexity on one set, with the standard error."""
    figure, axes = _figure(set_name, "perplexity", axis)
    for number, run in enumerate(runs):
        history = run.history(set_name)
        if history:
            ppl = np.array([line["ppl"] for line in history])
            error = ppl * np.array([line["stderr"] for line in history])
            x = run.at([int(line["step"]) for line in history], axis)
            axes.errorbar(
                x, ppl, yerr=error, color=f"C{number % 10}", marker="o", markersize=3, capsize=2, label=run.name
            )
    axes.set_yscale("log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(_plain_number)
    axes.grid(which="minor", alpha=0.15)
    _save(figure, axes, path)


def _curve(axes: Any, run: RunRecords, lines: list[dict[str, Any]], key: str, axis: str, number: int) -> None:
    """Every value thin and pale, their running mean over it in the same colour."""
    x = run.at([int(line["step"]) for line in lines], axis)
    values = np.array([line[key] for line in lines], dtype=float)  # None becomes nan: the step was not finite
    colour = f"C{number % 10}"
    axes.plot(x, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(x, smooth(values, max(1, len(lines) // SMOOTHED_OVER)), color=colour, label=run.name)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Exponential mean with a memory of `width` values, unbiased from the first one on; width 1 changes nothing."""
    keep = math.exp(-1 / width) if width > 1 else 0.0
    out = np.empty_like(values)
    total = weight = 0.0
    for i, value in enumerate(values):
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight if weight else math.nan
    return out


def file_name(set_name: str) -> str:
    """The plot of a set; other characters than letters, digits, '.', '_' and '-' become '-'."""
    return f"ppl-{re.sub(r'[^A-Za-z0-9._-]', '-', set_name)}.png"


def _plain_number(value: float, _: int) -> str:
    return f"{value:,.6g}"


def _figure(title: str, unit: str, axis: str) -> tuple[Any, Any]:
    # Without pyplot a Figure draws with Agg and is freed like any other object.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(AXES[axis])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.2M tokens, not 1.2 beside a 1e6
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path)
