"""What a process that `srun` started needs to know of its peers, in the words that torch and DeepSpeed read."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import MutableMapping

from bd3_ds.runtime.errors import UserError

PORTS = range(20000, 30000)  # where ranks may meet: below those that a kernel gives to clients


def adopt_slurm(env: MutableMapping[str, str]) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT from srun's variables.

    Nothing is changed under another launcher, or in a batch script outside srun, which sees the job's variables but is
    no task of it. Raises UserError where the nodes have unequal numbers of tasks. Source: srun(1), OUTPUT ENVIRONMENT
    VARIABLES.
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
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_host(env["SLURM_STEP_NODELIST"])
    env.setdefault("MASTER_PORT", str(PORTS[(job + step) % len(PORTS)]))


def first_host(nodes: str) -> str:
    """The first of Slurm's node list, such as node01 of node[01-03,7],login; by scontrol where it is installed."""
    if shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)  # up to a comma outside brackets
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} names no host; set MASTER_ADDR to the first host's address")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
