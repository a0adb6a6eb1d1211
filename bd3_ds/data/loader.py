"""Micro-batches from MDS shards, forever, each sequence with its slot in the step's global batch.

streaming lays samples out in one canonical order that does not depend on the cluster and deals them to ranks one by
one: position j of a rank on one of N nodes with R ranks each is sample (j * R + local rank) * N + node of that order
(streaming/base/partition/orig.py; held by tests/unit/data/test_loader.py against streaming itself). So a global batch
of G sequences is the same G samples at any world size and micro-batch, and a sample's slot is arithmetic.

An epoch is as many whole global batches as there are; its last few samples, fewer than G, are left out.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from bd3_ds.config.check_data import packs, size_in_bytes
from bd3_ds.config.schema import DataConfig
from bd3_ds.data.documents import document_numbers, read_starts
from bd3_ds.data.manifest import is_same_pack, read_manifest
from bd3_ds.data.mixture import samples_of_epoch
from bd3_ds.data.read_only import shard_directory
from bd3_ds.data.remote import fetch_facts, pack_directory
from bd3_ds.data.shards import read_shard_cut
from bd3_ds.data.shared_memory import clear_stale, hold
from bd3_ds.data.streaming_import import import_streaming
from bd3_ds.runtime.errors import EXIT_USER_ERROR, UserError


@dataclass(frozen=True)
class MicroBatch:
    """tokens [m, L] int64 and their slots [m] in the global batch; `waited` is seconds spent getting it.

    `documents` [m, L] int64 numbers each place's document in its sequence, -1 where there is no text; None where
    nothing is padding and data.document_mask is false. `ids` [m] number the samples, those of data.train first.
    """

    tokens: Tensor
    slots: np.ndarray
    waited: float
    documents: Tensor | None = None
    ids: Sequence[int] = ()


@dataclass(frozen=True)
class Share:
    """A rank's part in a run's batches: where it stands in the cluster, and the batch numbers.

    `replicas` ranks in a row read the same samples, each of which counts once in the global batch.
    """

    rank: int
    world_size: int
    local_size: int
    micro_batch: int
    global_batch: int
    replicas: int = 1

    @property
    def readers(self) -> int:
        """Ranks that read different samples."""
        return self.world_size // self.replicas

    @property
    def nodes(self) -> int:
        """Nodes that samples are dealt to: as streaming counts them, one where replicas do not fill whole nodes."""
        return self.readers // self.local_size if self.readers % self.local_size == 0 else 1

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one optimizer step."""
        return self.global_batch // (self.micro_batch * self.readers)

    def slots(self, micro_step: int) -> np.ndarray:
        """Slots [m] of the micro-batch `micro_step` (0 … accumulation - 1) of a step."""
        per_node = self.readers // self.nodes
        node, local_rank = divmod(self.rank // self.replicas, per_node)
        position = micro_step * self.micro_batch + np.arange(self.micro_batch)
        return (position * per_node + local_rank) * self.nodes + node


class Loader:
    """Iterate once; the stream starts after `samples` samples of the run and never ends.

    Raises UserError where a pack cannot be read; of all ranks that meet one, the first says it and the others just end.
    """

    def __init__(self, data: DataConfig, share: Share, samples: int):
        self.share = share
        try:
            self.dataset = self._open(data, share)
        except UserError as error:
            raise of_all_ranks(error, share) from None
        # Nodes of the canonical order that are a sample short repeat one, in the last row of all.
        whole = self.dataset.epoch_size // data.canonical_nodes * data.canonical_nodes
        self.steps_per_epoch = whole // share.global_batch
        self._data = data
        self._samples = samples

    def _open(self, data: DataConfig, share: Share) -> Any:
        import_streaming()
        from bd3_ds.data.checked_stream import CheckedDataset, CheckedStream

        places = {pack: fetch_facts(pack, data.cache) for pack in packs(data)}
        self._identity = identity(data)
        manifests = [read_manifest(place) for place in places.values()]
        self._padded = any(manifest.padding > 0 for manifest in manifests)
        counts = samples_of_epoch(data, [manifest.chunks for manifest in manifests]) if data.mix else [None]
        with _one_run_at_a_time(share):
            streams = [
                CheckedStream(pack, shard_directory(pack, data.cache), count)
                for pack, count in zip(places, counts, strict=True)
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


def start_method() -> str:
    """How loader processes start: anew beside a GPU, whose driver and NCCL do not survive a fork; else by a fork, which
    takes no time. They are children of the trainer either way, so that `obey_parent_alone` knows whom to obey.
    """
    return "spawn" if torch.cuda.is_available() else "fork"


def identity(data: DataConfig) -> dict[str, Any]:
    """What tells the packs of a run from others, data.train first: hashes of their tokens, and of their shards' cut.

    Both make the order of samples; where the packs lie and how their shards are compressed does not.
    """
    places = [pack_directory(pack, data.cache) for pack in packs(data)]
    manifests = [read_manifest(place) for place in places]
    return {
        "pack_hashes": [manifest.pack_hash for manifest in manifests],
        "content_hashes": [manifest.content_hash for manifest in manifests],
        "shard_cuts": [read_shard_cut(place) for place in places],
    }


def require_same_packs(data: DataConfig, saved: dict[str, Any], saved_by: str) -> None:
    """Raise UserError unless the packs are those that `saved`, a `Loader.state`, was counted in.

    What `saved` does not say, as that of earlier versions, is not compared. `saved_by` is the run's directory.
    """
    mend = f"name the pack it was started with, or start a new run_dir with train.init_from={saved_by}"
    now = identity(data)
    if len(saved.get("pack_hashes", now["pack_hashes"])) != len(now["pack_hashes"]):
        raise UserError(f"data.mix has another number of packs than {saved_by} was started with; {mend}")
    for i, pack in enumerate(packs(data)):
        key = "data.mix" if i else "data.train"
        manifest = read_manifest(pack_directory(pack, data.cache))
        before, cut_before = (
            saved.get("pack_hashes", now["pack_hashes"])[i],
            saved.get("shard_cuts", now["shard_cuts"])[i],
        )
        content = saved["content_hashes"][i] if "content_hashes" in saved else None
        differ, after = "another pack", manifest.pack_hash
        if is_same_pack(before, content, manifest):
            differ, before, after = "the same tokens cut into other shards", cut_before, now["shard_cuts"][i]
            if before == after:
                continue
        raise UserError(
            f"{key}: '{pack}' is {differ} (hash {after[:12]}) than {saved_by} was started with (hash "
            f"{before[:12]}), so its samples have another order; {mend}"
        )


def failure_or(collate: Any, samples: list[Any]) -> Any:
    """The first failure among samples, or `collate` of them."""
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or collate(samples)


def stack_tokens(samples: list[dict[str, Any]]) -> tuple[Tensor, None, list[int]]:
    """Token rows of samples as one int64 tensor [m, L], and their numbers; streaming's arrays are read-only: copied."""
    tokens = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
    return tokens, None, [int(sample["id"]) for sample in samples]


def stack_with_documents(samples: list[dict[str, Any]], apart: bool = True) -> tuple[Tensor, Tensor, list[int]]:
    """Token rows of samples and each place's document (`document_numbers`), both int64 [m, L], and their numbers."""
    tokens, _, ids = stack_tokens(samples)
    starts, pads = ([read_starts(sample[column]) for sample in samples] for column in ("doc_starts", "pad_starts"))
    documents = torch.from_numpy(document_numbers(list(starts), list(pads), tokens.shape[1], apart))
    return tokens, documents, ids


def of_all_ranks(error: UserError, share: Share) -> BaseException:
    """What this rank raises for `error`: `run_command` prints what global rank 0 raises, and no other rank's.

    A broken shard is met by some ranks or by all, so the first to meet it speaks.
    """
    if not torch.distributed.is_initialized():
        return error
    try:
        first = torch.distributed.distributed_c10d._get_default_store().add("bd3_ds/data-failure", 1) == 1
    except RuntimeError:  # the store has gone with the rank that held it, and that has its own reason
        first = False
    if first and share.rank == 0:
        return error
    if first:
        print(file=sys.stderr)  # rank 0 has its progress bar on the console's line
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr, flush=True)
    return SystemExit(EXIT_USER_ERROR)


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

    info = get_worker_info()
    assert info is not None

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        info.dataset.give_up()  # type: ignore[attr-defined]
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
