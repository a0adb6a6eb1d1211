"""How fast the run goes: tokens per second, model FLOPs utilisation, memory, waiting for data; how noisy it is."""

from __future__ import annotations

import itertools
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bd3_ds.config.schema import RunConfig
from bd3_ds.model.dit import Network
from bd3_ds.model.flops import training_flops_per_sequence
from bd3_ds.train.gpus import gpu_of_driver

if TYPE_CHECKING:  # a plan asks for the peak rate, and needs no DeepSpeed
    from bd3_ds.train.step import StepResult

LEAST_SECONDS = 0.02  # that products must take together, so that the cost of starting them does not count
PRODUCTS = 4  # timed together
LARGEST = {"cuda": 8192, "cpu": 2048}  # sides of the matrices: 0.4 GB in bf16


def peak_flops(device: torch.device, precision: str) -> float:
    """Matrix rate in FLOP/s: the maker's figure for known GPUs in bf16, else measured on products of this precision."""
    if device.type == "cuda" and precision == "bf16":
        known = gpu_of_driver(torch.cuda.get_device_name(device))
        if known is not None:
            return known.peak_bf16
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    timed = _timed_on_gpu if device.type == "cuda" else _timed_on_cpu

    def seconds_of(side: int) -> float:
        a = torch.ones(side, side, device=device, dtype=dtype)
        return timed(lambda: a @ a)

    return measured_rate(seconds_of, LARGEST["cuda" if device.type == "cuda" else "cpu"])


def measured_rate(seconds_of: Callable[[int], float], largest: int, rounds: int = 3) -> float:
    """FLOP/s of square products, by `seconds_of` PRODUCTS of them with matrices of a given side.

    The side doubles until they take LEAST_SECONDS or the side is `largest`; a device that is quick looks slow on small
    ones, whose start takes longer than they do. The best of `rounds` counts.
    """
    side = 1024
    seconds_of(side)  # warms up
    seconds = seconds_of(side)
    while side < largest and seconds < LEAST_SECONDS:
        side *= 2
        seconds = seconds_of(side)
    if seconds < 10 * LEAST_SECONDS:  # longer ones vary little, and each counts in the time of the start
        seconds = min(seconds, *(seconds_of(side) for _ in range(rounds)))
    return PRODUCTS * 2 * side**3 / seconds


def _timed_on_cpu(product: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        product()
    return time.perf_counter() - start


def _timed_on_gpu(product: Callable[[], object]) -> float:
    """By the device's own clock, in which starting from the host has no part."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(PRODUCTS):
        product()
    end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) / 1000, 1e-9)


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

    Two clocks: that of the steps alone (perf/tokens_per_s, perf/mfu, perf/data_wait), which says how fast the training
    itself is, and that of the wall (perf/tokens_per_s_wall, perf/mfu_wall), in which saves, exports, searches,
    validation and logging count, and from which the end of the run follows.
    """

    def __init__(self, network: Network, run: RunConfig, peak: float):
        """`peak` is the FLOP/s of all ranks together."""
        self._network = network
        self._run = run
        self._tokens = run.train.global_batch * run.data.length
        self._peak = peak
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._flops = 0.0
        self._nelbo: list[tuple[float, object]] = []  # and what its noise was
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
        block size and interval: the fall of the loss itself, slow beside it, is not in it.
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
