"""How long ranks wait for one another, read back from real process groups."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.helpers.launch import PATIENCE, ROOT, environment
from tests.helpers.tiny import tiny_run

TIMEOUTS = """
import sys
import torch
from bd3_ds.runtime.world import collective_timeout, join_world
join_world(collective_timeout(int(sys.argv[1])))
import deepspeed
groups = [torch.distributed.group.WORLD, torch.distributed.new_group([0]), deepspeed.comm.new_group([0])]
print([int(group._get_backend(torch.device("cpu")).options._timeout.total_seconds()) for group in groups])
print(int(torch.distributed.distributed_c10d._get_default_timeout("nccl").total_seconds()))
"""


@pytest.mark.parametrize(("stall_seconds", "timeout"), [(1800, 2400), (15, 615), (0, 30 * 86400)])
def test_every_group_waits_longer_than_the_guard(stall_seconds, timeout):
    """The first group, those made later, and DeepSpeed's: a guard shows its stacks before the peers give up."""
    env = {**environment(), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", TIMEOUTS, str(stall_seconds)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str([timeout] * 3), str(timeout)]


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_in_a_sentence(tmp_path):
    """Before anything is written."""
    tiny_run(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "run.py", "train", str(tmp_path / "recipe.yaml")],
            cwd=ROOT,
            env={**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 2 and f"error: port {port} is taken on this host; give another" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
