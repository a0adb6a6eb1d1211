"""Ranks that share sequences compute what one rank computes: losses, gradients, whole runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, environment, free_port

CASES = [
    {"objective": "bd3", "length": 2048},
    {"objective": "bd3", "length": 2048, "views": 2, "packed": True},
    {"objective": "bd3", "length": 2048, "block_size": 1024, "rows": 1},  # a part holds one block
    {"objective": "bd3", "length": 2048, "block_size": 2048, "rows": 1},  # a block goes over both parts
    {"objective": "ar", "length": 2048, "packed": True},
    {"objective": "mdlm", "length": 2048, "packed": True},
    {"objective": "sedd", "length": 2048},
]


@pytest.mark.slow
def test_two_ranks_have_the_loss_and_the_gradients_of_one():
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    words = ["tests/helpers/sequence_probe.py", json.dumps(CASES)]
    done = subprocess.run([*launcher, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    found = [json.loads(line) for line in re.findall(r"RESULT (.*)", done.stdout)]
    assert len(found) == len(CASES), done.stdout + done.stderr
    for case, differences in zip(CASES, found, strict=True):
        assert max(differences.values()) < 2e-5, (case, differences)
