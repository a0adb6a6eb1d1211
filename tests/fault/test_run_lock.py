"""A run that is started twice: the second start says who trains it and leaves everything as it was."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_ds.checkpoint.store import complete_checkpoints
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World
from bd3_ds.train.run_lock import HELD, LOCK, run_lock
from tests.helpers.launch import ROOT, launch_training, start_training, stop, wait_until
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import tiny_run

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
HOLD = """
import sys, time
from pathlib import Path
import torch
from bd3_ds.runtime.world import World
from bd3_ds.train import run_lock
if sys.argv[2] == "without":
    def refuse(*_): raise OSError(95, "Operation not supported")
    run_lock.fcntl.lockf = refuse
with run_lock.run_lock(Path(sys.argv[1]), World(0, 1, 0, 1, torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def holder(directory: Path, locks: str = "with") -> subprocess.Popen[str]:
    """A process that holds the directory until its input ends."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory), locks], cwd=ROOT, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(directory: Path, world: World = ALONE) -> None:
    with run_lock(directory, world, patience=0.3):
        pass


def test_the_second_start_changes_nothing_and_gets_the_run_when_the_first_is_killed(tmp_path):
    run = tiny_run(tmp_path)
    recipe, run_dir = tmp_path / "recipe.yaml", Path(run.run_dir)
    words = ("train.checkpoint_every=5", "train.export_every=1000000", "eval.sets={}", "data.workers=0")
    with start_training(recipe, *words, "train.total_steps=1000000", ranks=1, stderr=subprocess.DEVNULL) as first:
        wait_until(lambda: len(complete_checkpoints(run_dir / "checkpoints")) > 0, 300, "a checkpoint")
        os.killpg(first.pid, signal.SIGSTOP)  # it lives, and what it writes stands still
        (run_dir / "records" / "finished.json").write_text('{"step": 0}')
        before = contents(run_dir)
        second = launch_training(recipe, *words, "train.total_steps=1000000", "optim.lr=0.1", ranks=1)
        assert second.returncode == 2, second.stdout
        assert contents(run_dir) == before
        who = f"error: run_dir={run_dir} is in use: process {first.pid} on {socket.gethostname()} trains it since 20"
        assert [line.startswith(who) for line in second.stdout.splitlines() if "error" in line] == [True]
        stop(first, signal.SIGKILL)
    reached = complete_checkpoints(run_dir / "checkpoints")[-1].state["step"]
    third = launch_training(recipe, *words, f"train.total_steps={reached + 2}", ranks=1)
    assert third.returncode == 0, third.stdout
    assert f"continuing {run_dir} after step {reached}" in third.stdout
    assert f"going on with train.total_steps 1000000 -> {reached + 2}\n" in third.stdout


@pytest.mark.parametrize(("locks", "file"), [("with", LOCK), ("without", HELD)])
def test_a_killed_holder_is_followed_with_locks_and_without(tmp_path, monkeypatch, locks, file):
    if locks == "without":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)
    with holder(tmp_path, locks) as process:
        with pytest.raises(UserError, match=f"is in use: process {process.pid} on {socket.gethostname()} ") as caught:
            take(tmp_path)
        assert ("remove this file" in str(caught.value)) == (locks == "without")
        assert json.loads((tmp_path / file).read_text())["pid"] == process.pid
        process.send_signal(signal.SIGKILL)
        process.wait()
        take(tmp_path)
        take(tmp_path)  # given back


def test_without_locks_a_holder_on_another_machine_is_believed(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    words = {"host": "node7", "pid_space": "", "pid": 2**22 + 1, "started": 0.0, "since": "2026-01-02 03:04:05 +0000"}
    (tmp_path / HELD).write_text(json.dumps(words))
    sentence = rf"process {2**22 + 1} on node7 trains it since 2026-01-02 .*{HELD}: .* remove this file"
    with pytest.raises(UserError, match=sentence):
        take(tmp_path)
    assert json.loads((tmp_path / HELD).read_text()) == words


def test_all_ranks_of_a_second_start_end(tmp_path):
    with holder(tmp_path) as process:
        errors = on_ranks(2, lambda world: take(tmp_path, world))
        assert [f"process {process.pid} on " in str(error) for error in errors] == [True, True]
        process.kill()
    assert on_ranks(2, lambda world: take(tmp_path, world)) == [None, None]
