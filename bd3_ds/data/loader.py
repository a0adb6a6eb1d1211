"""Micro-batches from MDS shards, forever, each sequence with its slot in the step's global batch.

streaming lays samples out in one canonical order that does not depend on the cluster and deals them to ranks one by
one: position j of a rank on one of N nodes with R ranks each is sample (j * R + local rank) * N + node of that order
(streaming/base/partition/orig.py; held by tests/unit/test_loader.py against streaming itself). So a global batch of G
sequences is the same G samples at any world size and micro-batch, and a sample's slot is arithmetic.

An epoch is as many whole global batches as there are; its last few samples, fewer than G, are left out.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd3_ds.config.schema import DataConfig
from bd3_ds.data.pack import document_numbers, read_starts
from bd3_ds.data.streaming_import import import_streaming


@dataclass(frozen=True)
class MicroBatch:
    """tokens [m, L] int64 and their slots [m] in the global batch; `waited` is seconds spent getting it.

    `documents` [m, L] int64 numbers each token's document in its sequence; None unless data.document_mask.
    """

    tokens: Tensor
    slots: np.ndarray
    waited: float
    documents: Tensor | None = None


@dataclass(frozen=True)
class Share:
    """A rank's part in a run's batches: where it stands in the cluster, and the batch numbers."""

    rank: int
    world_size: int
    local_size: int
    micro_batch: int
    global_batch: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def slots(self, micro_step: int) -> np.ndarray:
        """Slots [m] of the micro-batch `micro_step` (0 … accumulation - 1) of a step."""
        nodes = self.world_size // self.local_size
        node, local_rank = divmod(self.rank, self.local_size)
        position = micro_step * self.micro_batch + np.arange(self.micro_batch)
        return (position * self.local_size + local_rank) * nodes + node


class Loader:
    """Iterate once; the stream starts after `samples` samples of the run and never ends."""

    def __init__(self, data: DataConfig, share: Share, samples: int):
        streaming = import_streaming()
        self.share = share
        with _one_run_at_a_time(share):
            self.dataset = streaming.StreamingDataset(
                local=str(Path(data.train).resolve()),
                shuffle=data.shuffle,
                shuffle_seed=data.shuffle_seed,
                num_canonical_nodes=data.canonical_nodes,
                batch_size=share.micro_batch,
            )
        self.steps_per_epoch = self.dataset.num_samples // share.global_batch
        self._workers = data.workers
        self._data = data
        self._samples = samples
        self._make_loader: Any = streaming.StreamingDataLoader

    def state(self, samples: int) -> dict[str, Any]:
        """What streaming needs to continue after `samples` samples of the run; for the checkpoint."""
        per_epoch = self.steps_per_epoch * self.share.global_batch
        epoch, sample = divmod(samples, per_epoch)
        return {
            "epoch": epoch,
            "sample_in_epoch": sample,
            "num_canonical_nodes": self._data.canonical_nodes,
            "shuffle_seed": self._data.shuffle_seed,
            "initial_physical_nodes": self.share.world_size // self.share.local_size,
        }

    def __iter__(self) -> Iterator[MicroBatch]:
        step, accumulation = self._samples // self.share.global_batch, self.share.accumulation
        while True:
            state = self.state(step * self.share.global_batch)
            self.dataset.load_state_dict(state)
            left = self.steps_per_epoch - state["sample_in_epoch"] // self.share.global_batch
            batches = iter(
                self._make_loader(
                    self.dataset,
                    batch_size=self.share.micro_batch,
                    num_workers=self._workers,
                    collate_fn=stack_with_documents if self._data.document_mask else stack_tokens,
                    worker_init_fn=obey_parent_alone,
                    drop_last=True,
                )
            )
            for _ in range(left):
                for micro_step in range(accumulation):
                    start = time.perf_counter()
                    tokens, documents = next(batches)
                    waited = time.perf_counter() - start
                    yield MicroBatch(tokens, self.share.slots(micro_step), waited, documents)
                step += 1


def stack_tokens(samples: list[dict[str, Any]]) -> tuple[Tensor, None]:
    """Token rows of samples as one int64 tensor [m, L]; streaming's own arrays are read-only, so they are copied."""
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64)), None


def stack_with_documents(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Token rows of samples and each token's document (`document_numbers`), both int64 [m, L]."""
    tokens, _ = stack_tokens(samples)
    starts, pads = ([read_starts(sample[column]) for sample in samples] for column in ("doc_starts", "pad_starts"))
    return tokens, torch.from_numpy(document_numbers(list(starts), list(pads), tokens.shape[1]))


@contextmanager
def _one_run_at_a_time(share: Share) -> Iterator[None]:
    """Runs that start together on one host would find the same name in shared memory free, and all but one fail.

    Runs over several hosts go without: each could hold one host and wait for the other.
    """
    handle = os.open("/dev/shm", os.O_RDONLY)
    try:
        if share.rank == 0 and share.local_size == share.world_size:
            fcntl.flock(handle, fcntl.LOCK_EX)  # given back when the handle is closed, also by a kill
        _barrier()
        yield
        _barrier()
    finally:
        os.close(handle)


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def obey_parent_alone(_worker: int) -> None:
    """A stop signal reaches every process of a run; loading goes on until the trainer has finished its step and saved.

    The trainer's own SIGTERM still counts: Python sends it to the children of an ending process and waits for them.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
