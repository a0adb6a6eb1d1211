"""How fast the run goes: tokens per second, model FLOPs utilisation, memory, waiting for data; how noisy it is."""

from __future__ import annotations

import itertools
import resource
import time
from typing import TYPE_CHECKING

import torch

from bd3_ds.config.schema import RunConfig
from bd3_ds.model.dit import Network
from bd3_ds.model.flops import training_flops_per_sequence
from bd3_ds.train.gpus import gpu_of_driver

if TYPE_CHECKING:  # a plan asks for the peak rate, and needs no DeepSpeed
    from bd3_ds.train.step import StepResult


def peak_flops(device: torch.device, precision: str) -> float:
    """Matrix rate in FLOP/s: the maker's figure for known GPUs in bf16, else measured on a 1024^3 product."""
    if device.type == "cuda" and precision == "bf16":
        known = gpu_of_driver(torch.cuda.get_device_name(device))
        if known is not None:
            return known.peak_bf16
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated on the GPU, or resident in RAM for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """Rates over the steps since the last `read`."""

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

    def add(self, result: StepResult) -> None:
        """One optimizer step."""
        run = self._run
        self._steps += 1
        self._flops += run.train.global_batch * training_flops_per_sequence(
            self._network,
            run.objective.name,
            run.data.length,
            result.block_size,
            result.masked_share,
            run.objective.views,
        )
        self._seconds += result.seconds
        self._waited += result.waited
        self._nelbo.append((result.nelbo, (result.block_size, result.interval)))

    def read(self) -> dict[str, float]:
        """TensorBoard scalars since the last call, and a fresh start.

        train/var_nelbo is the variance over batches of the training estimate, from the differences of neighbours of one
        block size and interval: the fall of the loss itself, slow beside it, is not in it.
        """
        seconds = max(self._seconds, 1e-9)
        values = {
            "perf/tokens_per_s": self._steps * self._tokens / seconds,
            "perf/mfu": self._flops / seconds / self._peak,
            "perf/data_wait": self._waited / seconds,
        }
        pairs = itertools.pairwise(self._nelbo)
        jumps = [(later - earlier) ** 2 for (earlier, kind), (later, other) in pairs if kind == other]
        if jumps:
            values["train/var_nelbo"] = sum(jumps) / (2 * len(jumps))
        self._reset()
        return values
