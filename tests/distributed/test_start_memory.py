"""What a start holds: no whole fp32 copy of the network, neither when DeepSpeed takes it over nor afterwards."""

import pickle
import subprocess
import sys

import pytest

from bd3_ds.model.build import dit_config
from bd3_ds.planning.memory import parameter_count
from tests.helpers.launch import ROOT, environment, free_port
from tests.helpers.tiny import tiny_run

# Prints the bytes of fp32 tensors that live when DeepSpeed is called, and when the trainer is built.
SCRIPT = """
import gc, json, pickle, sys
import deepspeed, torch
from bd3_ds.config.ds_json import load_ds_json
from bd3_ds.data.data_facts import read_data_facts
from bd3_ds.runtime.world import join_world
from bd3_ds.train.build import build
from bd3_ds.train.engine import Engine
from pathlib import Path

def live():
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.dtype == torch.float32 and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())

initialize, seen = deepspeed.initialize, []
def looking(**given):
    gc.collect()
    seen.append(live())
    return initialize(**given)
deepspeed.initialize = looking
run = pickle.loads(Path(sys.argv[1]).read_bytes())
trainer = build(run, read_data_facts(run.data), load_ds_json(Path(sys.argv[2])), join_world())
gc.collect()
seen.append(live())
print("live", json.dumps(seen), flush=True)
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_no_whole_copy_in_fp32(tmp_path, stage):
    words = {"model__hidden_size": 256, "model__layers": 4, "train__precision": "bf16", "train__global_batch": 2}
    run = tiny_run(tmp_path, **words)
    (tmp_path / "run.pickle").write_bytes(pickle.dumps(run))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, tmp_path / "run.pickle", ROOT / f"ds_configs/zero{stage}.json"]
    done = subprocess.run(command, env=environment() | place, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("live "))
    before, after = (int(word.strip("[],")) for word in line.split()[1:])
    copy = 4 * parameter_count(dit_config(run.model, run.objective.name))
    assert before < 0.1 * copy
    assert 4 * copy <= after < 4.3 * copy  # masters, two moments and the average, and small buffers
