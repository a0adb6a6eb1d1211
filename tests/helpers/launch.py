"""Training as a user starts it: run.py in processes of its own, under DeepSpeed's launcher for several ranks."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bd3_ds.runtime import records
from bd3_ds.runtime.run_dir import TRAIN_RECORDS, VALIDATION

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds; a crowded machine is slow, a stuck run is slower


@contextmanager
def start_training(
    recipe: Path, *words: str, ranks: int = 2, ds_config: str | None = None, script: str = "run.py", **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """The run as a process group of its own, nothing of which outlives the block; `options` are Popen's.

    One rank is started without a launcher, which is a way in of its own. `ds_config` is a name in ds_configs/.
    `script` stands for run.py.
    """
    command = [*(launcher(ranks) if ranks > 1 else [sys.executable]), script, "train", str(recipe), *words]
    if ds_config is not None:
        command += ["--deepspeed_config", f"ds_configs/{ds_config}.json"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, text=True, start_new_session=True, **options
    )
    try:
        yield process
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def launcher(ranks: int) -> list[str]:
    """DeepSpeed's launcher on a host, as the command `deepspeed` starts it on each.

    That command imports DeepSpeed for this alone, seconds a start. Tests of the main job, two hosts and a taken port
    use it.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    words = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--log_level=info"]
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launch", *words]


def launch_training(
    recipe: Path,
    *words: str,
    ranks: int = 2,
    ds_config: str | None = None,
    script: str = "run.py",
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr come back together as `stdout`."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with start_training(recipe, *words, ranks=ranks, ds_config=ds_config, script=script, **options) as process:
        output, _ = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def train(recipe: Path, *words: str, **options: Any) -> str:
    """`launch_training` that must succeed; returns what it said."""
    done = launch_training(recipe, *words, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def stop(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal the whole group, as a terminal or a cluster does, and wait until the last process has left."""
    _signal_group(process, number)
    wait_for_end(process)


def wait_for_end(process: subprocess.Popen[str], timeout: float = PATIENCE) -> int:
    """Wait until no process of the group runs; the launcher alone may leave before its ranks."""
    wait_until(lambda: process.poll() is not None and not _group(process), timeout, "the end of the run")
    return process.wait()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str], timeout: float = PATIENCE) -> None:
    """Wait until `step` is on record; the run must not end before."""

    def arrived() -> bool:
        there = any(record["step"] >= step for record in train_records(run_dir))
        assert there or process.poll() is None, f"the run ended with {process.returncode} before step {step}"
        return there

    wait_until(arrived, timeout, f"step {step}")


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Look every few milliseconds; TimeoutError names what did not come."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.005)


def rank_process(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The trainer process of a rank under the launcher (its data-loading children have the same command line)."""
    for child in _group(process):
        parent = child.parent()
        launched = parent is not None and any("deepspeed.launcher.launch" in word for word in parent.cmdline())
        if launched and f"--local_rank={rank}" in child.cmdline():
            return child
    raise AssertionError(f"no process of rank {rank}")


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of records/train.jsonl, as they stand."""
    return records.read(run_dir / TRAIN_RECORDS)


def curve(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; one line a step and none missing."""
    lines = train_records(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def validation_curve(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Bound and standard error on held-out text by step; one line a step."""
    lines = records.read(run_dir / VALIDATION)
    found = {line["step"]: (line["nelbo"], line["stderr"]) for line in lines}
    assert len(found) == len(lines)
    return found


def _group(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for other in psutil.process_iter():
        try:
            if os.getpgid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def environment() -> dict[str, str]:
    """The launcher looks for ninja on the path; more than one thread a rank makes tiny models slower."""
    tools = Path(sys.executable).parent
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
