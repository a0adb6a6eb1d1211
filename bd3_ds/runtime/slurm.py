"""Rank variables from srun's and mpirun's, under the names that torch and DeepSpeed read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from bd3_ds.runtime.errors import UserError

PORTS = range(20000, 30000)  # where ranks may meet: below those that a kernel gives to clients


# Rank, ranks, rank on the host, ranks of the host, as mpirun says them: Open MPI; MPICH and Intel MPI (Hydra).
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_OTHER_WAYS = "start with `deepspeed run.py train` or `./run.sh train`"


def adopt_launcher(env: MutableMapping[str, str]) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT from what started this process.

    The variables of torchrun's and DeepSpeed's launchers stand as they are; else mpirun's are taken, else srun's:
    inside a Slurm job mpirun starts its daemons by srun, whose variables then are not those of the ranks. Raises
    UserError where they contradict each other, or do not say enough for the ranks to meet.
    """
    mpi = next((names for names in _MPI if names[1] in env and names[3] in env), None)
    started = int(env[mpi[1]]) if mpi else int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    by = mpi[1] if mpi else "SLURM_STEP_NUM_TASKS"
    _require_sound(env)
    if "RANK" in env:
        # There may be more ranks than processes: torchrun, started once a host.
        if mpi and started > int(env.get("WORLD_SIZE", "1")):
            _refuse_size(env, by)
    elif started > 1 and int(env.get("WORLD_SIZE", started)) != started:
        _refuse_size(env, by)
    elif mpi:
        _adopt_mpi(env, mpi)
    elif "SLURM_STEP_NUM_TASKS" in env:
        adopt_slurm(env)
    elif int(env.get("PMI_SIZE", "1")) > 1:
        raise UserError(
            f"PMI_SIZE={env['PMI_SIZE']} without MPI_LOCALRANKID: which rank of its host this process is cannot be "
            f"told; set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, or {_OTHER_WAYS}"
        )
    elif int(env.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"WORLD_SIZE={env['WORLD_SIZE']} without RANK: set both, or unset it, or {_OTHER_WAYS}")


def ranks_of_host(env: Mapping[str, str]) -> int:
    """How many ranks this host has: torchrun says it as LOCAL_WORLD_SIZE, DeepSpeed's launcher as LOCAL_SIZE.

    Where both are there, one is left from a shell that the other kind of launcher started.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if "TORCHELASTIC_RUN_ID" in env else ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    return next((int(env[name]) for name in names if env.get(name)), 1)


def _require_sound(env: Mapping[str, str]) -> None:
    """Raises UserError for variables of a launcher that are no numbers or make no rank."""
    for name in (*_OURS, "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if name in env and not re.fullmatch(r"\d+", env[name]):
            raise UserError(f"{name}={env[name]} in the environment must be a whole number; unset it, or {_OTHER_WAYS}")
    rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    if "RANK" in env and rank >= size:
        given = f"WORLD_SIZE={size}" if "WORLD_SIZE" in env else "no WORLD_SIZE"
        raise UserError(f"RANK={rank} with {given} in the environment: ranks count from 0; set both, or unset RANK")


def _refuse_size(env: Mapping[str, str], by: str) -> None:
    size = f"WORLD_SIZE={env['WORLD_SIZE']}" if "WORLD_SIZE" in env else f"RANK={env['RANK']} without WORLD_SIZE"
    raise UserError(
        f"{by}={env[by]}, but {size}: processes would train alone into one run_dir; unset RANK and WORLD_SIZE, "
        f"or {_OTHER_WAYS}"
    )


def _adopt_mpi(env: MutableMapping[str, str], names: tuple[str, ...]) -> None:
    """What mpirun says; it does not say where ranks meet, which is made up on one host and must be given for several.

    Sources: Open MPI, `mpirun(1)`, ENVIRONMENT; MPICH's Hydra, pmiserv (PMI_*) and proxy (MPI_LOCAL*).
    """
    for ours, name in zip(_OURS, names, strict=True):
        if name not in env:
            raise UserError(f"{names[1]}={env[names[1]]} without {name}: {_OTHER_WAYS}")
        env[ours] = env[name]
    if env["WORLD_SIZE"] == "1":
        return
    port = None
    if env["WORLD_SIZE"] == env["LOCAL_SIZE"]:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        started_by = _first_ancestor_without(names[0])
        port = str(PORTS[started_by % len(PORTS)]) if started_by else None
    if "MASTER_PORT" not in env and port is not None:
        env["MASTER_PORT"] = port
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError(
            f"{names[1]}={env[names[1]]}, {env['LOCAL_SIZE']} of them on this host: where they meet must be given; "
            "set MASTER_ADDR=<first host> MASTER_PORT=29500 for all of them, or start with `deepspeed --hostfile` or "
            "`./run.sh train --hostfile`"
        )


def _first_ancestor_without(name: str) -> int | None:
    """The process above this one that has no variable `name`: what started the ranks, whatever wraps each of them."""
    pid = os.getppid()
    while pid > 0:
        process = Path("/proc", str(pid))
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except PermissionError:  # another user's: a daemon that starts ranks for us
            return pid
        except OSError:
            return None
        if not any(variable.startswith(name.encode() + b"=") for variable in variables):
            return pid
        try:
            pid = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return None
    return None


def adopt_slurm(env: MutableMapping[str, str]) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT from srun's variables.

    Nothing is changed under another launcher, or in a batch script outside srun, which sees the job's variables but is
    no task of it. Raises UserError where the nodes have unequal numbers of tasks, or the first of several cannot be
    told. Source: srun(1), OUTPUT ENVIRONMENT VARIABLES.
    """
    if "RANK" in env or "SLURM_STEP_NUM_TASKS" not in env:
        return
    per_node = {part.partition("(")[0] for part in env["SLURM_STEP_TASKS_PER_NODE"].split(",")}
    if len(per_node) > 1:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']}: every node needs the same number of ranks; "
            "give srun --ntasks-per-node"
        )
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["LOCAL_SIZE"] = per_node.pop()
    if "MASTER_ADDR" not in env:  # on one node nothing is asked: containers seldom have scontrol
        one_node = env["WORLD_SIZE"] == env["LOCAL_SIZE"]
        env["MASTER_ADDR"] = "127.0.0.1" if one_node else first_host(env["SLURM_STEP_NODELIST"])
    env.setdefault("MASTER_PORT", str(PORTS[(job + step) % len(PORTS)]))


def first_host(nodes: str) -> str:
    """The first of Slurm's node list, such as node01 of node[01-03,7],login, as scontrol tells it.

    Raises UserError where scontrol is not installed, or does not take the list.
    """
    instead = "set MASTER_ADDR to the first host's address"
    if shutil.which("scontrol") is None:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes} is read by Slurm's command scontrol, which is not on the PATH; {instead}"
        )
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        why = f" ({reason[-1]})" if (reason := done.stderr.strip().splitlines()) else ""
        raise UserError(f"SLURM_STEP_NODELIST={nodes} names no host that scontrol knows{why}; {instead}")
    return done.stdout.split()[0]
