"""The peak matrix-multiply rate of a device: the maker's figure for known GPUs, else measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bd3_ds.runtime.gpus import gpu_of_driver

LEAST_SECONDS = 0.02  # that products must take together, so that the cost of starting them does not count
PRODUCTS = 4  # timed together
SMALLEST = 256  # side of the matrices: a CPU without units for bf16 takes seconds for one product of side 1024
LARGEST = {"cuda": 8192, "cpu": 2048}  # 0.4 GB in bf16


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


def quicker_precision(device: torch.device) -> str:
    """bf16, or fp32 on a CPU that multiplies bf16 less than half as fast, as those without units for it do."""
    if device.type == "cuda":
        return "bf16"
    return "bf16" if peak_flops(device, "bf16") > peak_flops(device, "fp32") / 2 else "fp32"


def measured_rate(seconds_of: Callable[[int], float], largest: int, rounds: int = 3) -> float:
    """FLOP/s of square products, by `seconds_of` PRODUCTS of them with matrices of a given side.

    The side doubles until they take LEAST_SECONDS or the side is `largest`; a device that is quick looks slow on small
    ones, whose start takes longer than they do. The best of `rounds` counts.
    """
    side = SMALLEST
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
