"""What the benchmarks share: timing side by side, the machine, runs under the launcher, one JSON object as result.

Times of this machine are compared only where they were taken in turn, so that whatever else it does hits all alike.
That does not help threads: they wait for each other by spinning, and get slower many times over where something else
takes a core. Where the machine is not free, measure with --threads 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]


def interleaved(
    variants: Mapping[str, Callable[[], object]], repeats: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run of each variant: all of them once a round, every other round in reverse order.

    The first `warmup` rounds do not count. On a GPU a run ends when the device has finished.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + repeats):
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in order:
            _synchronise()
            start = time.perf_counter()
            variants[name]()
            _synchronise()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
        say(f"round {number + 1} of {warmup + repeats}")
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of runs."""
    low, median, high = (seconds[0],) * 3
    if len(seconds) > 1:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "runs": len(seconds)}


def rate(amount: float, seconds: dict[str, Any]) -> dict[str, Any]:
    """`amount` per second from a summary of seconds: its slow quartile is the low rate."""
    return {
        "median": amount / seconds["median"],
        "low": amount / seconds["high"],
        "high": amount / seconds["low"],
        "runs": seconds["runs"],
    }


def machine() -> dict[str, Any]:
    """Where and when a figure was taken."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The short commit, with "+changes" where the working tree differs; "unknown" outside a repository."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+changes" if _git("status", "--porcelain") else "") if head else "unknown"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def peak_rss_gb() -> float:
    """The most memory in GiB that this process has had resident.

    Not ru_maxrss: a child inherits that of the process that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20  # given in KiB
    raise RuntimeError("/proc/self/status has no VmHWM")


class Process:
    """A fresh process that keeps what it makes: functions of a module are called in it, one at a time."""

    def __init__(self) -> None:
        # An executor: results and exceptions come back, and the process may have children of its own.
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.call(torch.set_num_threads, torch.get_num_threads())
        # It would start children as it was started itself, which is not how a run does it.
        self.call(multiprocessing.set_start_method, multiprocessing.get_start_method(), True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What it returns or raises."""
        return self._pool.submit(function, *arguments, **options).result()


@contextmanager
def launched(
    words: Sequence[str], ranks: int = 1, threads: int = 1, launcher: bool = True, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """`run.py` with `words`, on `ranks` ranks of `threads` threads each; nothing of it outlives the block.

    Under DeepSpeed's launcher, or without one (one rank). `options` are Popen's.
    """
    tools = Path(sys.executable).parent
    command = [sys.executable]
    if launcher:
        command = [str(tools / "deepspeed"), "--log_level", "warning", "--num_accelerators", str(ranks)]
        command += ["--master_port", str(_free_port())]
    # The launcher hands the number of threads on as it finds it, and looks for ninja on the path.
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PATH": path}
    process = subprocess.Popen(
        [*command, "run.py", *words],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_to_end(words: Sequence[str], log: Path, code: int = 0, timeout: float = 1800.0, **options: Any) -> None:
    """`launched` until it ends with `code`; what it says goes to `log` and, if it ends otherwise, into the error."""
    with log.open("w") as file, launched(words, stdout=file, stderr=subprocess.STDOUT, **options) as process:
        found = process.wait(timeout=timeout)
    if found != code:
        raise RuntimeError(f"run.py {' '.join(words)} ended with {found}, not {code}:\n{log.read_text()[-4000:]}")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark; parsing sets the number of torch threads."""
    made = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    made.add_argument("--repeats", type=int, default=7, help="timed runs of each variant")
    made.add_argument("--threads", type=int, default=cores(), help="of torch; default: every core there is")
    return made


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options = super().parse_args(args, namespace)
        torch.set_num_threads(options.threads)
        return options


def finish(
    name: str, settings: argparse.Namespace | dict[str, Any], results: Any, json_path: Path | None = None
) -> dict[str, Any]:
    """Print the result as JSON, write it to `json_path` if there is one, and return it."""
    values = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    settings = {key: value for key, value in values.items() if key != "json"}
    result = {"benchmark": name, "machine": machine(), "settings": settings, "results": results}
    text = json.dumps(result, indent=2, default=str)
    print(text)
    if json_path is not None:
        json_path.write_text(text + "\n")
    return result


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
