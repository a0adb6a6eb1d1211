"""Processes of srun know their peers without a launcher of DeepSpeed's."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_ds.commands.eval_worker import worker_parser
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.slurm import adopt_launcher, adopt_slurm, first_host, ranks_of_host

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
def path(monkeypatch, tmp_path):
    """A folder for stand-ins of Slurm's commands, the only one that is looked in."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def stand_in(folder: Path, nodes: str, answer: str) -> None:
    """A scontrol that knows this list of nodes alone."""
    tool = folder / "scontrol"
    tool.write_text(
        f'#!/bin/sh\n[ "$*" = "show hostnames {nodes}" ] && printf "{answer}" && exit\n'
        'echo "Invalid hostlist: $3" >&2\nexit 1\n'
    )
    tool.chmod(0o755)


def test_scontrol_tells_the_first_host(path):
    stand_in(path, "rack[2-3]-n[08-11],login", r"rack2-n08\nrack2-n09\n")
    assert first_host("rack[2-3]-n[08-11],login") == "rack2-n08"
    with pytest.raises(UserError, match=r"NODELIST=odd\[ names no host .*\(Invalid hostlist: odd\[\); set MASTER_ADDR"):
        first_host("odd[")


def test_without_scontrol_the_address_must_be_given():
    with pytest.raises(UserError, match=r"NODELIST=node\[03-04\] is read by .*scontrol, which is not on the PATH; set"):
        adopt_slurm(dict(TASK))


def test_on_one_node_nobody_is_asked():
    env = {**TASK, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_STEP_NODELIST": "node03"}
    adopt_slurm(env)
    assert (env["WORLD_SIZE"], env["MASTER_ADDR"]) == ("4", "127.0.0.1")


def test_a_task_of_srun_knows_its_peers(path):
    stand_in(path, "node[03-04]", r"node03\nnode04\n")
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


ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "configs" / "slurm"


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


def ompi(rank: int, size: int, local: int | None = None) -> dict[str, str]:
    """What Open MPI's mpirun says."""
    words = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": local or size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in words.items()}


def hydra(rank: int, size: int) -> dict[str, str]:
    """What MPICH's and Intel MPI's mpirun say."""
    return {"PMI_RANK": f"{rank}", "PMI_SIZE": f"{size}", "MPI_LOCALRANKID": f"{rank}", "MPI_LOCALNRANKS": f"{size}"}


@pytest.mark.parametrize("words", [ompi, hydra])
def test_processes_of_mpirun_on_one_host_know_their_peers_and_meet_at_one_port(words):
    envs = [words(rank, 2) for rank in range(2)]
    for env in envs:
        adopt_launcher(env)
    assert [[env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")] for env in envs] == [
        ["0", "2", "0", "2"],
        ["1", "2", "1", "2"],
    ]
    assert {env["MASTER_ADDR"] for env in envs} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in envs}) == 1 and 20000 <= int(envs[0]["MASTER_PORT"]) < 30000


def test_ranks_in_shells_of_their_own_meet_at_one_port():
    code = "import os; from bd3_ds.runtime.slurm import adopt_launcher; adopt_launcher(os.environ); "
    code += "print(os.environ['MASTER_PORT'])"
    ports = []
    for rank in range(2):
        env = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, **ompi(rank, 2)}
        command = ["/bin/bash", "-c", '"$0" -c "$1"; true', sys.executable, code]
        ports.append(subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert ports[0] == ports[1] and ports[0].strip().isdigit()


def test_mpirun_inside_a_slurm_job_counts_more_than_the_srun_of_its_daemons():
    env = {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", **ompi(1, 2)}
    adopt_launcher(env)
    assert (env["RANK"], env["WORLD_SIZE"]) == ("1", "2")


def test_several_hosts_of_mpirun_need_an_address():
    with pytest.raises(UserError, match=r"4, 2 of them on this host.*set MASTER_ADDR=<first host> MASTER_PORT=29500"):
        adopt_launcher(ompi(0, 4, 2))
    env = ompi(0, 4, 2) | {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    adopt_launcher(env)
    assert (env["WORLD_SIZE"], env["LOCAL_SIZE"], env["MASTER_ADDR"]) == ("4", "2", "n1")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({**ompi(0, 2), "WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_SIZE=2, but WORLD_SIZE=1: processes would train alone"),
        ({**ompi(0, 2), "RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2, but RANK=0 without WORLD_SIZE"),
        ({**TASK, "WORLD_SIZE": "1"}, "SLURM_STEP_NUM_TASKS=8, but WORLD_SIZE=1"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE=2 without MPI_LOCALRANKID"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "1"}, "RANK=1 with no WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x in the environment must be a whole number"),
    ],
)
def test_what_contradicts_itself_is_refused(env, said):
    with pytest.raises(UserError, match=said):
        adopt_launcher(env)


def test_torchrun_started_once_a_host_by_mpirun_or_srun_stands():
    for outer in (ompi(1, 2, 1), TASK):
        env = {**outer, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
        before = dict(env)
        adopt_launcher(env)
        assert env == before


def test_ranks_of_a_host_by_either_name():
    assert ranks_of_host({"LOCAL_WORLD_SIZE": "8"}) == ranks_of_host({"LOCAL_SIZE": "8"}) == 8
    assert ranks_of_host({"LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "4"}) == 4
    assert ranks_of_host({"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}) == 4
    assert ranks_of_host({}) == 1
