"""Packs whose samples say which they are, and ranks that read them: real processes with gloo, without an engine."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bd3_ds.config.load import load_defaults
from bd3_ds.config.schema import DataConfig
from bd3_ds.data.data_facts import read_data_facts
from bd3_ds.data.loader import Loader
from bd3_ds.data.share import Share
from bd3_ds.data.streaming_import import import_streaming
from bd3_ds.runtime.errors import UserError
from tests.helpers.tiny import LENGTH, tiny_tokenizer

BASE = 64  # a chunk's first two tokens are the digits of its number, its third is the mark of its pack
_FORK = multiprocessing.get_context("fork")


def numbered_pack(directory: Path, chunks: int, mark: int = 0, to_a_shard: int = 16, pads: bool = False) -> Path:
    """A pack of `chunks` chunks with numbers of their own, `to_a_shard` in each shard.

    A second document begins at place 5; with `pads` the last 4 places are padding.
    """
    from data_prep.pack_writer import write_pack

    tokenizer = tiny_tokenizer()
    gaps = np.array([LENGTH - 4] if pads else [], np.int64)

    def rows() -> Any:
        for i in range(chunks):
            row = np.full(LENGTH, mark)
            row[:2] = divmod(i, BASE)
            yield row, np.array([0, 5]), gaps

    with mock.patch("data_prep.pack_writer.GROUP_TOKENS", to_a_shard * LENGTH):
        write_pack(directory, rows(), tokenizer, LENGTH, name=directory.name)
    return directory


def data_config(train: Path | str, **changes: Any) -> DataConfig:
    """The defaults for a pack of `numbered_pack`, with `changes`."""
    data = load_defaults({"run_dir": "x", "data.train": str(train), "data.length": LENGTH}, "a test").data
    return dataclasses.replace(data, **changes)


def open_loader(data: DataConfig, share: Share, samples: int = 0) -> Loader:
    """A loader of the packs that `data` names, whose facts are read only for it.

    Their files are not looked at before, as the start of a run does: what happens to them later is the loader's to see.
    """
    return Loader(data, read_data_facts(data, check_files=False), share, samples)


def numbers(tokens: np.ndarray) -> np.ndarray:
    """Which sample each row is: its number, plus 10,000 times the mark of its pack."""
    return tokens[:, 0] * BASE + tokens[:, 1] + 10_000 * tokens[:, 2]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Who reads, and in what batches."""

    ranks: int = 1
    workers: int = 0
    micro_batch: int = 1
    global_batch: int = 8
    replicas: int = 1


def read(data: DataConfig, cluster: Cluster, first: int, steps: int) -> np.ndarray:
    """The samples [steps, global_batch] in the slots of the steps from `first` on; raises what a rank raised.

    Every rank is a process that ends without any clean-up, as a killed one does.
    """
    with tempfile.TemporaryDirectory() as meeting:
        results = _together(cluster.ranks, lambda rank: _read_rank(data, cluster, rank, meeting, first, steps))
    found = np.full((steps, cluster.global_batch), -1)
    for rank, (slots, samples) in enumerate(results):
        before = found[np.arange(steps)[:, None], slots]
        assert (before == (-1 if rank % cluster.replicas == 0 else samples)).all(), "replicas differ, or slots collide"
        found[np.arange(steps)[:, None], slots] = samples
    assert (found >= 0).all()
    return found


def _read_rank(
    data: DataConfig, cluster: Cluster, rank: int, meeting: str, first: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(cluster.ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(cluster.ranks)
    )
    if cluster.ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=cluster.ranks
        )
    share = Share(rank, cluster.ranks, cluster.ranks, cluster.micro_batch, cluster.global_batch, cluster.replicas)
    data = dataclasses.replace(data, workers=cluster.workers)
    batches = iter(open_loader(data, share, first * cluster.global_batch))
    slots, samples = [], []
    for _ in range(steps * share.accumulation):
        batch = next(batches)
        slots.append(batch.slots)
        samples.append(numbers(batch.tokens.numpy()))
    return np.array(slots).reshape(steps, -1), np.array(samples).reshape(steps, -1)


def _together(ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns in a fork for each rank; a rank's UserError is raised here, others as text."""
    import_streaming()  # once, not in every fork
    import bd3_ds.data.checked_stream  # noqa: F401

    def run(rank: int, pipe: Any) -> None:
        os.setpgid(0, 0)
        try:
            pipe.send(work(rank))
        except UserError as error:
            pipe.send(error)
        except BaseException:
            pipe.send(traceback.format_exc())
        pipe.recv()  # all have what they need of each other

    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=run, args=(rank, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    try:
        for pipe in pipes:
            assert pipe.poll(120), "a rank says nothing"
            results.append(pipe.recv())
    finally:
        for process in processes:
            os.killpg(process.pid, 9)  # with its loader processes
            process.join()
    for result in results:
        if isinstance(result, UserError):
            raise result
        assert not isinstance(result, str), result
    return results
