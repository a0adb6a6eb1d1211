#!/usr/bin/env bash
# torch 2.13.0, gloo: the timeout given to init_process_group is that of the first group alone.
#
# A good guess was that groups made later by new_group inherit it. They do not: each takes torch's own default
# (30 minutes) unless it is given one. A trainer that asks for two hours at its start so still ends after half an hour
# in the first collective of a group of its own, such as those of sequence or tensor parallelism.
#
# Seen: "world 123.0 s, later group 1800.0 s, later group with timeout 45.0 s". Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.1.3
cd "$folder"
MASTER_ADDR=127.0.0.1 MASTER_PORT=0 "$folder/venv/bin/python" - <<'END'
from datetime import timedelta

import torch
import torch.distributed as dist


def seconds(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=123))
first, later = dist.group.WORLD, dist.new_group([0])
told = dist.new_group([0], timeout=timedelta(seconds=45))
print(f"torch {torch.__version__}: world {seconds(first)} s, later group {seconds(later)} s, "
      f"later group with timeout {seconds(told)} s")
assert (seconds(first), seconds(later), seconds(told)) == (123.0, 1800.0, 45.0), "behaviour has changed"
END
