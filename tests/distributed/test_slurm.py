"""The batch script and tasks of srun, with small stand-ins for Slurm's own commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_ds.checkpoint.store import complete_checkpoints
from bd3_ds.runtime.run_dir import FINISHED
from tests.helpers.launch import PATIENCE, ROOT, curve, environment, train, wait_for_step
from tests.helpers.tiny import tiny_run

pytestmark = pytest.mark.slow

# Two tasks on one node, as srun starts them; their process ids go to a file, the largest code comes back.
SRUN = """#!/usr/bin/env python
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost"}
tasks = [subprocess.Popen(words, env={**os.environ, **step, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
         for n in range(2)]
open(os.environ["FAKE_SLURM"] + "/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCANCEL = """#!/bin/sh
echo "scancel $*" >>$FAKE_SLURM/said
kill -TERM $(cat $FAKE_SLURM/tasks)
"""
SCONTROL = """#!/bin/sh
[ "$1" = show ] && echo 127.0.0.1 && exit
echo "scontrol $*" >>$FAKE_SLURM/said
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    tools = tmp_path / "slurm"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "said").touch()
    version = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    env = environment()
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions" / version))
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "FAKE_SLURM": str(tools)}
    return {**env, **job, "PATH": f"{tools}{os.pathsep}{env['PATH']}"}


def test_the_batch_script_saves_queues_again_and_finishes(tmp_path, slurm):
    tiny_run(tmp_path)
    words = ("train.total_steps=200", "train.checkpoint_every=50", "train.export_every=200")
    calm, job, said = tmp_path / "calm", tmp_path / "job", tmp_path / "slurm/said"
    train(tmp_path / "recipe.yaml", *words, f"run_dir={calm}")

    command = ["bash", "configs/slurm/train.sbatch", str(tmp_path / "recipe.yaml"), *words, f"run_dir={job}"]
    with (tmp_path / "log").open("w") as log:
        options = {"cwd": ROOT, "env": slurm, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
        try:
            wait_for_step(job, 10, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 75, (tmp_path / "log").read_text()
        finally:
            process.kill()
        lines = [f"scancel --signal=TERM {slurm['SLURM_JOB_ID']}.0", f"scontrol requeue {slurm['SLURM_JOB_ID']}"]
        assert said.read_text().splitlines() == lines
        assert complete_checkpoints(job / "checkpoints")[-1].state["step"] >= 10 and not (job / FINISHED).exists()

        assert subprocess.run(command, timeout=PATIENCE, **options).returncode == 0, (tmp_path / "log").read_text()  # type: ignore[call-overload]
    assert said.read_text().splitlines() == lines
    assert (job / FINISHED).exists() and curve(job) == curve(calm)
