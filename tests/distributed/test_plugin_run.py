"""Training under the launcher with the modules of docs/extending.md, and evaluating what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from bd3_ds.config.load import load_resolved
from bd3_ds.runtime.errors import EXIT_USER_ERROR
from tests.helpers.launch import ROOT, environment, launch_training, train, train_records
from tests.helpers.tiny import tiny_run
from tests.unit.config.test_extending import blocks

pytestmark = pytest.mark.slow
WORDS = ("plugins=[my_schedules]", "objective.schedule.name=steep", "objective.schedule.parameters={exponent: 2.5}")


def test_two_ranks_train_with_a_schedule_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "my_schedules.py").write_text(blocks("python")[0])
    tiny_run(tmp_path)
    refused = launch_training(tmp_path / "recipe.yaml", *WORDS)
    assert refused.returncode != 0 and "plugins names the module my_schedules" in refused.stdout

    monkeypatch.setenv("PYTHONPATH", str(modules))
    train(tmp_path / "recipe.yaml", *WORDS)
    run_dir = tmp_path / "run"
    assert [line["step"] for line in train_records(run_dir)] == [1, 2, 3, 4]
    assert load_resolved(run_dir / "run.yaml").plugins == ["my_schedules"]

    command = [sys.executable, str(ROOT / "run.py"), "evaluate", str(run_dir)]
    bare = environment()
    without = subprocess.run(command, cwd=modules, env=bare, capture_output=True, text=True)
    assert without.returncode == EXIT_USER_ERROR and "BD3_DS_PLUGINS=my_schedules" in without.stderr
    assert "Traceback" not in without.stderr
    # The module lies in the working directory.
    bare.pop("PYTHONPATH")
    scored = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")],
        cwd=modules,
        env=bare | {"BD3_DS_PLUGINS": "my_schedules"},
        capture_output=True,
        text=True,
    )
    assert scored.returncode == 0, scored.stderr
    assert json.loads((tmp_path / "out.json").read_text())
    assert os.path.exists(run_dir / "exports")


@pytest.mark.parametrize("ds_config", ["zero0", "zero2", "zero3"])
def test_an_optimizer_of_the_user_goes_on_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ds_config: str
) -> None:
    (tmp_path / "my_optimizer.py").write_text(blocks("python")[2])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tiny_run(tmp_path)
    words = ("plugins=[my_optimizer]", "optim.name=sgd", "optim.lr=0.1")
    losses = []
    for name, stops in (("whole", (4,)), ("halves", (2, 4))):
        for steps in stops:
            run_dir = f"run_dir={tmp_path / name}"
            train(tmp_path / "recipe.yaml", *words, run_dir, f"train.total_steps={steps}", ds_config=ds_config)
        losses.append([(line["loss"], line["grad_norm"]) for line in train_records(tmp_path / name)])
    assert losses[0] == losses[1] and len(losses[0]) == 4
    with safe_open(tmp_path / "whole/checkpoints/step-00000004/rank-00000.safetensors", "pt") as file:
        assert {key.partition("/")[0] for key in file.keys()} == {"weights", "momentum_buffer", "ema"}  # noqa: SIM118
