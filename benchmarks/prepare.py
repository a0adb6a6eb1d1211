"""What preparation costs: tokens per second against the tokenizer's own, and memory as the input grows.

    python -m benchmarks.prepare --source DIR --tokenizer DIR [--times 10] [--length 1024] [--repeats 3] [--json FILE]

In turns: the tokenizer alone (`encode_batch` over the texts in one thread, texts read beforehand), and the command
data_prep.prepare with 1 worker and with one a core, start-up, reading, packing, compression and hashing included, over
the text as it is and over so many copies of it. `per_core` is the command's rate per core over the tokenizer's own.
Memory is what the command and its workers together have resident, the peak in each fifth of the run: a worker that
writes for the first time loads 0.3 GiB of libraries, and nothing else may make it grow. Equal inputs must give equal
pack hashes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT, cores, finish, interleaved, parser, say, summary


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--source", type=Path, required=True, help="directory with text files")
    options.add_argument("--split", default="train", help="names begin with it")
    options.add_argument("--tokenizer", required=True, help="directory or .model file")
    options.add_argument("--length", type=int, default=1024, help="tokens of a chunk")
    options.add_argument("--times", type=int, default=10, help="copies of the text in the large input")
    asked = options.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from bd3_ds.data.tokenizer import load_tokenizer
    from data_prep.parts import cut
    from data_prep.sources import open_source

    tokenizer = load_tokenizer(asked.tokenizer)
    source = open_source(str(asked.source), asked.split)
    batches = [[piece.text for piece in part] for part in cut(source.pieces())]
    tokens = sum(len(ids) for batch in batches for ids in tokenizer.encode_batch(batch))
    say(f"{tokens:,} tokens in {len(batches)} batches")
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch, "small"), Path(scratch, "large")
        copies(asked.source, asked.split, small, 1)
        copies(asked.source, asked.split, large, asked.times)
        found: dict[str, list[dict[str, Any]]] = {}

        def command(name: str, text: Path, workers: int) -> None:
            found.setdefault(name, []).append(prepared(text, Path(scratch, name), asked, workers))

        seconds = interleaved(
            {
                "tokenizer": lambda: [tokenizer.encode_batch(batch) for batch in batches],
                "1 worker": lambda: command("1 worker", small, 1),
                f"{cores()} workers": lambda: command(f"{cores()} workers", small, cores()),
                f"{cores()} workers, {asked.times} x": lambda: command(
                    f"{cores()} workers, {asked.times} x", large, cores()
                ),
            },
            asked.repeats,
            warmup=0,
        )
    alone = tokens / summary(seconds.pop("tokenizer"))["median"]
    results: dict[str, Any] = {"tokens": tokens, "tokenizer_tokens_per_s": alone}
    for name, runs in found.items():
        rate = runs[0]["tokens"] / summary(seconds[name])["median"]
        used = min(cores(), int(name.split()[0]))
        results[name] = {
            "seconds": summary(seconds[name]),
            "tokens": runs[0]["tokens"],
            "tokens_per_s": rate,
            "per_core": rate / used / alone,
            "peak_rss_gib": [max(peaks) for peaks in zip(*(run["peak_rss_gib"] for run in runs), strict=True)],
            "pack_hashes": sorted({run["pack_hash"] for run in runs}),
        }
    finish("prepare", asked, results, asked.json)
    return 0


def copies(source: Path, split: str, folder: Path, times: int) -> None:
    """Links to the source's files, so many times over."""
    folder.mkdir()
    for number in range(times):
        for file in sorted(path for path in source.rglob(f"{split}*") if path.is_file()):
            (folder / f"{split}-{number:03d}-{file.name}").symlink_to(file.resolve())


def prepared(text: Path, out: Path, asked: Any, workers: int) -> dict[str, Any]:
    """Run the command to its end; what it made, and its peak memory."""
    from bd3_ds.data.manifest import read_manifest

    words = ["--source", str(text), "--tokenizer", asked.tokenizer, "--length", str(asked.length), "--out", str(out)]
    process = psutil.Popen(
        [sys.executable, "-m", "data_prep.prepare", *words, "--workers", str(workers), "--overwrite"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    used: list[int] = []
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            used.append(sum(member.memory_info().rss for member in family))
        except psutil.Error:  # one of them has just ended
            pass
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"data_prep.prepare ended with {process.returncode}")
    manifest = read_manifest(out)
    fifths = [max(used[len(used) * i // 5 : len(used) * (i + 1) // 5]) / 2**30 for i in range(5)]
    return {"tokens": manifest.tokens, "pack_hash": manifest.pack_hash, "peak_rss_gib": fifths}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
