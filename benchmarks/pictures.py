"""The pictures of README.md, from the runs of `./run.sh`.

    python -m benchmarks.pictures runs/docs/pretrain runs/docs/finetune --samples runs/docs/samples.json \\
        --out docs/pictures

curves.png    training and validation bound of the runs, one after the other, over tokens
mask.png      the attention mask of block diffusion, as the model's own code has it
denoising.png, tensorboard.png    screenshots, where a Chromium is installed (--browser names another)
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from bd3_ds.model.attention.masks import pass_mask
from bd3_ds.report.curves import smooth
from bd3_ds.report.denoising import denoising_page
from bd3_ds.runtime import records
from bd3_ds.runtime.cli import Parser
from bd3_ds.runtime.errors import UserError, run_command
from bd3_ds.runtime.run_dir import TRAIN_RECORDS, VALIDATION
from bd3_ds.runtime.samples import read_samples

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (  # a browser that looks for nothing but the page
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
COLOURS = 64  # of a PNG: text and lines need no more, and the files stay small
LENGTH, BLOCK = 12, 4  # of the mask that is drawn
CURVES = "^(eval/valid/ppl|perf/tokens_per_s|train/grad_norm|train/nelbo)$"  # in the picture of TensorBoard
WAIT = 60.0  # seconds for TensorBoard to begin to serve


def main(argv: list[str]) -> int:
    """Write what can be written and say what is left out."""
    options = _parser().parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        if not (run / TRAIN_RECORDS).is_file():
            raise UserError(f"{run} has no {TRAIN_RECORDS}; give runs that were trained, such as runs/docs/pretrain")
    curves(options.runs, options.out / "curves.png")
    mask(options.out / "mask.png")
    browser = options.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no Chromium found: denoising.png and tensorboard.png are left out; --browser PATH names one")
    else:
        if options.samples is not None:
            denoising(browser, options.samples, options.out / "denoising.png")
        tensorboard(browser, options.runs, options.out / "tensorboard.png")
    for path in sorted(options.out.glob("*.png")):
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.pictures", description="The pictures of README.md.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="in the order in which they were trained")
    parser.add_argument(
        "--samples", type=Path, metavar="FILE", help="of `run.py sample --json`, for the denoising page"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--browser", metavar="PATH", help="a Chromium; default: the one that is installed")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def curves(runs: list[Path], path: Path) -> None:
    """Bounds over tokens: each run's training estimate, smoothed, and its validation values with their errors."""
    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    before = 0.0
    for number, run in enumerate(runs):
        lines = [line for line in records.read(run / TRAIN_RECORDS) if line.get("nelbo") is not None]
        tokens = before + np.array([line["tokens"] for line in lines], dtype=float)
        values = np.array([line["nelbo"] for line in lines], dtype=float)
        colour = f"C{number}"
        axes.plot(tokens / 1e6, values, color=colour, alpha=0.2, linewidth=0.7)
        axes.plot(tokens / 1e6, smooth(values, max(1, len(lines) // 25)), color=colour, label=f"{run.name}: training")
        held_out = records.read(run / VALIDATION)
        at = {line["step"]: place for line, place in zip(lines, tokens, strict=True)}
        axes.errorbar(
            [at[line["step"]] / 1e6 for line in held_out],
            [line["nelbo"] for line in held_out],
            yerr=[line["stderr"] for line in held_out],
            color=colour,
            marker="o",
            linestyle="--",
            capsize=2,
            label=f"{run.name}: validation, L' = {held_out[-1]['block_size']}" if held_out else None,
        )
        before = tokens[-1]
    axes.set_xlabel("tokens trained on (millions)")
    axes.set_ylabel("bound (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    _save(figure, path)


def mask(path: Path) -> None:
    """Which keys each query may attend to, in a training pass: noisy tokens first, then the clean ones."""
    allowed = pass_mask(LENGTH, LENGTH, 0, 0, BLOCK, False, torch.device("cpu")).dense.numpy()
    kind = np.zeros(allowed.shape)  # 0 hidden, 1 noisy to noisy, 2 noisy to clean, 3 clean to clean
    kind[:LENGTH, :LENGTH][allowed[:LENGTH, :LENGTH]] = 1
    kind[:LENGTH, LENGTH:][allowed[:LENGTH, LENGTH:]] = 2
    kind[LENGTH:, LENGTH:][allowed[LENGTH:, LENGTH:]] = 3
    assert not allowed[LENGTH:, :LENGTH].any(), "clean tokens see no noisy ones"
    colours = np.array([[0.95, 0.95, 0.94], [0.95, 0.62, 0.35], [0.36, 0.62, 0.84], [0.55, 0.75, 0.55]])
    figure = Figure(figsize=(5.2, 4.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(colours[kind.astype(int)], interpolation="none")
    for edge in np.arange(-0.5, 2 * LENGTH, BLOCK):
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    middles = [LENGTH / 2 - 0.5, 1.5 * LENGTH - 0.5]
    axes.set_xticks(middles, ["noisy $x_t$", "clean $x_0$"])
    axes.set_yticks(middles, ["noisy $x_t$", "clean $x_0$"], rotation=90, va="center")
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    names = ("own block, both directions", "earlier clean blocks", "clean text, block-causal")
    for colour, name in zip(colours[1:], names, strict=True):
        axes.plot([], [], "s", color=colour, label=name)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False, ncols=1)
    _save(figure, path)


def denoising(browser: str, samples: Path, path: Path) -> None:
    """The page of `run.py denoising`."""
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "page.html"
        page.write_text(denoising_page(read_samples(samples), [0]), encoding="utf-8")
        _screenshot(browser, page.as_uri(), path, (1100, 640), 2)


def tensorboard(browser: str, runs: list[Path], path: Path) -> None:
    """TensorBoard's page of the runs' main curves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "runs"  # the page names it
        folder.mkdir()
        for run in runs:
            (folder / run.name).symlink_to(run.resolve(), target_is_directory=True)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.name, "--port", str(port)]
        server = subprocess.Popen(
            [*command, "--reload_multifile", "true"],
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            address = f"http://127.0.0.1:{port}/"
            _wait_for(address, server)
            # Of its two dashboards this one draws on the page's own thread, which the browser's clock waits for.
            page = urllib.parse.urlencode({"tagFilter": CURVES, "_smoothingWeight": 0.9})
            _screenshot(browser, f"{address}#scalars&{page}", path, (1080, 770), 30)
        finally:
            server.terminate()
            server.wait()


def _wait_for(address: str, server: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + WAIT
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(address, timeout=1):
            return
        time.sleep(0.5)
    raise UserError(f"TensorBoard does not serve at {address}")


def _screenshot(browser: str, address: str, path: Path, size: tuple[int, int], seconds: int) -> None:
    with tempfile.TemporaryDirectory() as profile:
        words = [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", f"--screenshot={path.resolve()}"]
        words += [f"--virtual-time-budget={1000 * seconds}", address]
        done = subprocess.run([browser, *QUIET, *words], capture_output=True, text=True, timeout=180)
    if done.returncode or not path.is_file():
        raise UserError(f"{browser} drew nothing of {address}: {done.stderr[-300:]}")
    _few_colours(path)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    _few_colours(path)


def _few_colours(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        few = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
