"""How long ranks wait for one another, read back from real process groups."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.launch import ROOT, environment

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
