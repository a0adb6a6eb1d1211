"""Processes of srun know their peers without a launcher of DeepSpeed's."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from bd3_ds.evaluation.worker import worker_parser
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.slurm import adopt_slurm, first_host

TASK = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("node[01-03,7]", "node01"),
        ("node[7,1-3],login", "node7"),
        ("rack[2-3]-n[08-11]", "rack2-n08"),
        ("gpu-a[1]-ib,x", "gpu-a1-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_scontrol_is_asked_where_it_is_there(tmp_path):
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$*" = "show hostnames odd{1..2}" ] && echo odd1 && echo odd2\n')
    tool.chmod(0o755)
    assert first_host("odd{1..2}") == "odd1"
    assert first_host("node[01-02]") == "node01"  # it failed, so the list is read here


def test_a_task_of_srun_knows_its_peers():
    env = dict(TASK)
    adopt_slurm(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_SIZE"]) == ("5", "8", "1", "4")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node03", "23458")


def test_what_is_set_already_stays():
    env = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt_slurm(env)
    assert (env["RANK"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("5", "10.0.0.1", "29500")

    under_deepspeed = {**TASK, "RANK": "0"}
    adopt_slurm(under_deepspeed)
    assert under_deepspeed == {**TASK, "RANK": "0"}

    batch_script = {key: value for key, value in TASK.items() if "STEP" not in key}
    adopt_slurm(batch_script)
    assert "RANK" not in batch_script


def test_unequal_nodes_are_refused():
    with pytest.raises(UserError, match=r"SLURM_STEP_TASKS_PER_NODE=4\(x2\),3: every node needs the same"):
        adopt_slurm({**TASK, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"})


SCRIPTS = Path(__file__).resolve().parents[2] / "configs" / "slurm"


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert script.read_text().startswith("#!/bin/bash\n") and len(list(SCRIPTS.glob("*.sbatch"))) == 2
    done = subprocess.run(["/bin/bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_job_of_evaluation_workers_starts_one_with_options_that_it_has(tmp_path):
    """By an srun that says what it is to start, and in which environment."""
    tool = tmp_path / "srun"
    tool.write_text('#!/bin/bash\necho "$OMP_NUM_THREADS"\nprintf "%q " "$@"\nexit 7\n')
    tool.chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "6"}
    words = ["runs/a run", "--max-chunks", "64"]
    done = subprocess.run(
        ["/bin/bash", str(SCRIPTS / "eval_worker.sbatch"), *words],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    threads, started = done.stdout.splitlines()
    python, *rest = shlex.split(started)
    assert (done.returncode, threads, python) == (7, "6", "python")
    assert rest[:3] == ["-u", "run.py", "eval-worker"]
    options = worker_parser().parse(rest[3:])
    assert (options.run_dir, options.device, options.max_chunks) == (Path("runs/a run"), "cuda", 64)
    assert not options.once
