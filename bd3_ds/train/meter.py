"""Throughput metrics: tokens per second, model FLOPs utilisation, memory, data wait, variance of the estimate."""

from __future__ import annotations

import itertools
import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bd3_ds.config.schema import RunConfig
from bd3_ds.model.dit import DiTConfig
from bd3_ds.model.flops import training_flops_per_sequence

if TYPE_CHECKING:
    from bd3_ds.train.step import StepResult


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated on the GPU, or resident in RAM for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_in_use_gb(device: torch.device) -> float:
    """GiB for the console: the most that was allocated on the GPU, or what is resident in RAM now for a CPU run."""
    if device.type == "cuda":
        return peak_memory_gb(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


class Meter:
    """Rates over the steps since the last `read`.

    Two clocks: step time only (perf/tokens_per_s, perf/mfu, perf/data_wait), the speed of training itself, and wall
    time (perf/tokens_per_s_wall, perf/mfu_wall), with saves, exports, searches, validation and logging, from which the
    end of the run can be predicted.
    """

    def __init__(self, network: DiTConfig, run: RunConfig, peak: float):
        """`peak` is the FLOP/s of all ranks together."""
        self._network = network
        self._run = run
        self._tokens = run.train.global_batch * run.data.length
        self._peak = peak
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._flops = 0.0
        self._nelbo: list[tuple[float, object]] = []  # and its block size and interval
        self._waited = 0.0
        self._seconds = 0.0
        self._since = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """One optimizer step."""
        run = self._run
        self._steps += 1
        self._flops += run.train.global_batch * training_flops_per_sequence(
            self._network,
            run.objective.name,
            run.data.length,
            result.block_size,
            views=run.objective.views,
            head_tokens=result.head_tokens / run.train.global_batch,
        )
        self._seconds += result.seconds
        self._waited += result.waited
        self._nelbo.append((result.nelbo, (result.block_size, result.interval)))

    def read(self) -> dict[str, float]:
        """TensorBoard scalars since the last call, and a fresh start.

        train/var_nelbo is the variance over batches of the training estimate, from the differences of neighbours of one
        block size and interval: the slow decrease of the loss itself is not in it.
        """
        seconds, wall = max(self._seconds, 1e-9), max(time.perf_counter() - self._since, 1e-9)
        values = {
            "perf/tokens_per_s": self._steps * self._tokens / seconds,
            "perf/mfu": self._flops / seconds / self._peak,
            "perf/data_wait": self._waited / seconds,
            "perf/tokens_per_s_wall": self._steps * self._tokens / wall,
            "perf/mfu_wall": self._flops / wall / self._peak,
        }
        pairs = itertools.pairwise(self._nelbo)
        jumps = [(later - earlier) ** 2 for (earlier, kind), (later, other) in pairs if kind == other]
        if jumps:
            values["train/var_nelbo"] = sum(jumps) / (2 * len(jumps))
        self._reset()
        return values
