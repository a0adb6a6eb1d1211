"""Micro-batches from MDS shards, forever, each sequence with its slot in the step's global batch.

An epoch is as many whole global batches as there are; its last few samples, fewer than that, are left out.
"""

from __future__ import annotations

import fcntl
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from bd3_ds.config.check_data import size_in_bytes
from bd3_ds.config.schema import DataConfig
from bd3_ds.data.data_facts import DataFacts
from bd3_ds.data.loader_workers import obey_parent_alone, start_method
from bd3_ds.data.micro_batch import MicroBatch, failure_or, stack_tokens, stack_with_documents
from bd3_ds.data.rank_errors import of_all_ranks
from bd3_ds.data.read_only import shard_directory
from bd3_ds.data.share import Share
from bd3_ds.data.shared_memory import clear_stale, hold
from bd3_ds.data.streaming_import import import_streaming
from bd3_ds.runtime.errors import UserError


class Loader:
    """Iterate once; the stream starts after `samples` samples of the run and never ends. `facts` are those of `data`.

    Raises UserError where a pack cannot be read; of all ranks that meet one, the first says it and the others just end.
    """

    def __init__(self, data: DataConfig, facts: DataFacts, share: Share, samples: int):
        self.share = share
        try:
            self.dataset = self._open(data, facts, share)
        except UserError as error:
            raise of_all_ranks(error, share) from None
        # Nodes of the canonical order that are a sample short repeat one, in the last row of all.
        whole = self.dataset.epoch_size // data.canonical_nodes * data.canonical_nodes
        self.steps_per_epoch = whole // share.global_batch
        self._data = data
        self._samples = samples

    def _open(self, data: DataConfig, facts: DataFacts, share: Share) -> Any:
        import_streaming()
        from bd3_ds.data.checked_stream import CheckedDataset, CheckedStream

        self._identity, self._padded = facts.identity, facts.is_padded
        counts = facts.samples if data.mix else (None,)
        with _one_run_at_a_time(share):
            streams = [
                CheckedStream(of.pack, shard_directory(of.pack, data.cache), count)
                for of, count in zip(facts.packs, counts, strict=True)
            ]
            leads = share.rank % share.local_size == 0
            if leads:
                clear_stale([stream.local for stream in streams if stream.remote])
                for stream in streams:
                    stream.sweep()
            _barrier()
            dataset = CheckedDataset(
                streams,
                shuffle=data.shuffle,
                shuffle_algo=data.shuffle_algorithm,
                shuffle_seed=data.shuffle_seed,
                num_canonical_nodes=data.canonical_nodes,
                batch_size=share.micro_batch,
                predownload=data.predownload,
                cache_limit=size_in_bytes(data.cache_limit) if data.cache_limit else None,
                replication=share.replicas if share.replicas > 1 else None,
            )
            if leads:
                self._hold = hold(dataset._shm_prefix_int)
        return dataset

    def state(self, samples: int) -> dict[str, Any]:
        """Where the run stands after `samples` samples, and in which packs; for the checkpoint."""
        return {**self._position(samples), **self._identity}

    def _position(self, samples: int) -> dict[str, Any]:
        """What streaming needs to continue after `samples` samples of the run; it has room for little more."""
        per_epoch = self.steps_per_epoch * self.share.global_batch
        epoch, sample = divmod(samples, per_epoch)
        return {
            "epoch": epoch,
            "sample_in_epoch": sample,
            "num_canonical_nodes": self._data.canonical_nodes,
            "shuffle_seed": self._data.shuffle_seed,
            "initial_physical_nodes": self.share.nodes,
        }

    def __iter__(self) -> Iterator[MicroBatch]:
        step, accumulation = self._samples // self.share.global_batch, self.share.accumulation
        collate: Any = stack_tokens
        if self._padded or self._data.document_mask:
            collate = functools.partial(stack_with_documents, apart=self._data.document_mask)
        while True:
            state = self._position(step * self.share.global_batch)
            self.dataset.load_state_dict(state)
            left = self.steps_per_epoch - state["sample_in_epoch"] // self.share.global_batch
            batches = iter(
                DataLoader(
                    self.dataset,
                    batch_size=self.share.micro_batch,
                    num_workers=self._data.workers,
                    multiprocessing_context=start_method() if self._data.workers else None,
                    collate_fn=functools.partial(failure_or, collate),
                    worker_init_fn=obey_parent_alone,
                    drop_last=True,
                )
            )
            for _ in range(left):
                for micro_step in range(accumulation):
                    start = time.perf_counter()
                    batch = next(batches)
                    if isinstance(batch, UserError):
                        raise of_all_ranks(batch, self.share)
                    waited = time.perf_counter() - start
                    tokens, documents, ids = batch
                    yield MicroBatch(tokens, self.share.slots(micro_step), waited, documents, ids)
                step += 1


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
