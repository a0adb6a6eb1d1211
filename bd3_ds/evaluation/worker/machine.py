"""Default placement of a worker: the most idle GPU, else idle CPU cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from bd3_ds.evaluation.options import open_device

if TYPE_CHECKING:
    import torch

FREE_SHARE = 0.5  # of a GPU's memory that nobody holds, where a worker takes it unasked

_ASK_GPUS = (
    "import json, torch; "
    "print(json.dumps([torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]))"
)  # fmt: skip


def idle_device() -> torch.device:
    """The GPU with most free memory, or the CPU where there is none or a trainer holds them all."""
    import torch

    gpu = idle_gpu()
    return open_device("cpu") if gpu is None else torch.device("cuda", gpu)


def idle_threads() -> int:
    """Threads that do not disturb what runs here: OMP_NUM_THREADS where it is set, else the cores that nothing uses."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        return int(threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - round(os.getloadavg()[0]))


def idle_gpu() -> int | None:
    """The GPU with most free memory, None where each is more than half taken, as by a trainer, or there is none.

    Asked by a process of its own: looking takes memory on every GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    asked = subprocess.run([sys.executable, "-c", _ASK_GPUS], capture_output=True, text=True, check=False)
    return most_free(json.loads(asked.stdout)) if asked.returncode == 0 else None


def most_free(memory: list[tuple[int, int]]) -> int | None:
    """The number of the GPU with the largest free share of (free, total) bytes, None where none has half of it."""
    shares = [free / total for free, total in memory]
    best = max(shares, default=0.0)
    return shares.index(best) if best >= FREE_SHARE else None
