"""What the loader costs: tokens per second of ours, on MDS shards, against a bare memory map over the same tokens.

    python -m benchmarks.loader [--length 1024] [--batch 8] [--workers 0 1] [--batches 128] [--repeats 7] [--json FILE]

Both hand out shuffled micro-batches, int64 tensors [batch, length]; a timed run takes the next `batches` of them, all
within one epoch. The memory map is a flat file of uint16 read row by row in a random order: no shards, no resuming, no
deal to ranks, nothing to read between the rows. So it is a bound from below on what any loader costs, not a rival.

`first_batch_seconds` is the time to the first batch, once a run: shards are unpacked, the order is shuffled, workers
start. `share_of_step` is what share of a trainer's time ours would take that trains at `--step-rate` tokens per second
and has nobody to load beside it.
With workers, batches are made ahead, a few of them between the timed runs: so many batches a run that this is little.
Each number of workers has a fresh process, as streaming keeps shared memory by process.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Process, finish, interleaved, parser, peak_rss_gb, rate, say, summary

VOCAB = 2048  # packs hold uint16 up to 65536 tokens, so a larger vocabulary would be stored alike
WARMUP = 1


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    options.add_argument("--batch", type=int, default=8, help="sequences of a micro-batch")
    options.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="loader processes")
    options.add_argument("--batches", type=int, default=128, help="micro-batches of a timed run")
    options.add_argument("--step-rate", type=float, default=1e5, help="tokens per second that a trainer takes")
    asked = options.parse_args(argv)
    chunks = asked.batch * asked.batches * (WARMUP + asked.repeats + 1)  # one epoch is enough, with some to spare
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        pack, flat = Path(scratch, "pack"), Path(scratch, "tokens.bin")
        start = time.perf_counter()
        write_both(pack, flat, chunks, asked.length)
        say(f"wrote {chunks * asked.length:,} tokens in {time.perf_counter() - start:.1f} s")
        for workers in asked.workers:
            places = {"pack": str(pack), "flat": str(flat), "workers": workers, "length": asked.length}
            counts = {"batch": asked.batch, "batches": asked.batches, "repeats": asked.repeats}
            with Process() as process:
                result = process.call(compare, **places, **counts)
            result["share_of_step"] = asked.step_rate / result["tokens_per_s"]["loader"]["median"]
            results.append(result)
    finish("loader", asked, results, asked.json)
    return 0


def write_both(pack: Path, flat: Path, chunks: int, length: int) -> None:
    """The same tokens as a pack and as a flat file; frequencies fall as 1/rank, as those of a text about do."""
    from data_prep.pack_writer import write_pack
    from tests.helpers.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer(VOCAB - 1)
    ids = np.setdiff1d(np.arange(VOCAB), [tokenizer.mask_id])
    weights = 1 / np.arange(1, len(ids) + 1)
    rows = np.random.default_rng(0).choice(ids, (chunks, length), p=weights / weights.sum()).astype(np.uint16)
    rows.tofile(flat)
    write_pack(pack, ((row, np.array([0])) for row in rows), tokenizer, length, name="benchmark")


def compare(pack: str, flat: str, workers: int, length: int, batch: int, batches: int, repeats: int) -> dict[str, Any]:
    """Both readers in turn, for one number of workers; in a process of its own."""
    from bd3_ds.runtime.world import prepare_environment

    prepare_environment()  # streaming reads where it stands in the cluster
    sources = {"loader": ours(pack, length, batch, workers), "memmap": memory_map(Path(flat), length, batch)}
    first = {}
    for name, source in sources.items():
        start = time.perf_counter()
        tokens = next(source)
        first[name] = time.perf_counter() - start
        assert tokens.shape == (batch, length) and tokens.dtype == torch.int64

    def take(source: Iterator[torch.Tensor]) -> None:
        for _ in range(batches):
            next(source)

    variants = {name: functools.partial(take, source) for name, source in sources.items()}
    seconds = interleaved(variants, repeats, WARMUP)
    taken = {name: summary(times) for name, times in seconds.items()}
    amount = batches * batch * length
    return {
        "workers": workers,
        "tokens_per_run": amount,
        "seconds": taken,
        "tokens_per_s": {name: rate(amount, times) for name, times in taken.items()},
        "loader_over_memmap": taken["loader"]["median"] / taken["memmap"]["median"],
        "microseconds_per_sequence": {name: 1e6 * t["median"] / (batches * batch) for name, t in taken.items()},
        "first_batch_seconds": first,
        "peak_rss_gb": peak_rss_gb(),
    }


def ours(pack: str, length: int, batch: int, workers: int) -> Iterator[torch.Tensor]:
    """Micro-batches of a run on one rank."""
    from bd3_ds.config.load import load_defaults
    from bd3_ds.data.data_facts import read_data_facts
    from bd3_ds.data.loader import Loader
    from bd3_ds.data.share import Share

    values = {"run_dir": "none", "data.train": pack, "data.length": length, "data.workers": workers}
    data = load_defaults(values, "the benchmark").data
    for micro_batch in Loader(data, read_data_facts(data), Share(0, 1, 1, batch, batch), samples=0):
        yield micro_batch.tokens


def memory_map(flat: Path, length: int, batch: int) -> Iterator[torch.Tensor]:
    """The rows of a flat file in a random order, epoch after epoch."""
    rows = np.memmap(flat, np.uint16, mode="r").reshape(-1, length)
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(rows))
        for start in range(0, len(order) - batch + 1, batch):
            yield torch.from_numpy(rows[order[start : start + batch]].astype(np.int64))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
