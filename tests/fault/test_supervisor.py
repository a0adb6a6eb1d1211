"""The supervisor over the real launcher: a killed rank is started again, a signal saves, one curve comes out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from bd3_ds.checkpoint.store import complete_checkpoints
from bd3_ds.runtime.errors import EXIT_STOPPED
from bd3_ds.runtime.run_dir import FINISHED
from tests.helpers.launch import PATIENCE, ROOT, curve, environment, train, wait_for_step
from tests.helpers.tiny import tiny_run

pytestmark = pytest.mark.slow

# Long enough that a run is not done before a signal, which takes a second or two, has come to its ranks.
WORDS = ("train.total_steps=600", "train.checkpoint_every=10", "train.export_every=600", "train.micro_batch=1")


@contextmanager
def supervise(recipe: Path, log: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "bd3_ds", "launch", "--ranks", "2", "--restarts", "2", "--backoff", "0.1"]
    with log.open("w") as file:
        env = {**environment(), "PYTHONPATH": str(ROOT)}
        words = (recipe.name, *words)  # relative paths are those of the caller's directory
        process = subprocess.Popen([*command, *words], cwd=recipe.parent, env=env, stdout=file, stderr=file, text=True)
        try:
            yield process
        finally:
            with suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [child for child in family if "--local_rank=1" in child.cmdline()]


def test_a_killed_rank_and_a_signal(tmp_path):
    tiny_run(tmp_path)
    recipe, calm, hurt, log = tmp_path / "recipe.yaml", tmp_path / "calm", tmp_path / "hurt", tmp_path / "log"
    train(recipe, *WORDS, f"run_dir={calm}")

    with supervise(recipe, log, *WORDS, "run_dir=hurt") as process:
        wait_for_step(hurt, 15, process)
        os.kill(ranks(process)[0].pid, signal.SIGKILL)
        wait_for_step(hurt, 60, process)  # the second launch has come further
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == EXIT_STOPPED, log.read_text()
        assert not psutil.wait_procs(family, timeout=PATIENCE)[1]  # what was killed last may still be on its way out
    assert log.read_text().count("restart 1 of 2 in 0.1 s") == 1
    assert not {"[WARNING]", "[ERROR]", "return code"} & set(re.findall(r"\[[A-Z]+\]|return code", log.read_text()))
    assert complete_checkpoints(hurt / "checkpoints")[-1].state["step"] >= 60
    assert not (hurt / FINISHED).exists()

    with supervise(recipe, log, *WORDS, "run_dir=hurt") as process:
        assert process.wait(PATIENCE) == 0, log.read_text()
    assert "2 of 2 ranks (1 host x 2)\n" in log.read_text()
    assert (hurt / FINISHED).exists() and curve(hurt) == curve(calm)
