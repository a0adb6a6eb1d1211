"""The average of the weights, held in shards, is the average of the weights."""

import json
import re
import subprocess

import pytest

from tests.helpers.launch import ROOT, environment, launcher
from tests.helpers.tiny import tiny_run


@pytest.mark.slow
@pytest.mark.parametrize("ds_config", ["zero1", "zero2", "zero3"])
def test_the_sharded_average_is_the_whole_one_to_the_last_bit(tmp_path, ds_config):
    tiny_run(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("precision: fp32", "precision: bf16"))
    words = ["tests/helpers/average_probe.py", recipe, f"ds_configs/{ds_config}.json"]
    done = subprocess.run(
        [*launcher(2), *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    found = re.search(r"RESULT (.*)", done.stdout)
    assert found, done.stdout + done.stderr
    difference, held, numbers = json.loads(found[1])
    assert difference == 0.0
    assert sum(held) == 4 * numbers  # bytes
    assert max(held) < 0.51 * 4 * numbers
