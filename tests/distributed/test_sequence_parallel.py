"""Ranks that share sequences compute what one rank computes: losses, gradients, whole runs."""

import json
import re
import subprocess

import pytest

from tests.helpers.launch import ROOT, curve, environment, launcher, train, train_records
from tests.helpers.tiny import tiny_run

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
    words = ["tests/helpers/sequence_probe.py", json.dumps(CASES)]
    done = subprocess.run(
        [*launcher(2), *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    found = [json.loads(line) for line in re.findall(r"RESULT (.*)", done.stdout)]
    assert len(found) == len(CASES), done.stdout + done.stderr
    for case, differences in zip(CASES, found, strict=True):
        assert max(differences.values()) < 2e-5, (case, differences)


@pytest.mark.slow
def test_a_run_that_shares_sequences_is_the_run_of_one_rank(tmp_path):
    """Curves agree to rounding, and one rank that has all of each sequence goes on where two ranks stopped."""
    search = ("objective.clip_search.method=grid", "objective.clip_search.every=4", "objective.clip_search.sequences=8")
    words = ("objective.views=2", "train.activation_checkpointing=full", "train.checkpoint_every=8", *search)
    for name in ("alone", "shared"):
        (tmp_path / name).mkdir()
        tiny_run(tmp_path / name)
    train(tmp_path / "alone" / "recipe.yaml", *words, "train.total_steps=12", ranks=1)
    recipe = tmp_path / "shared" / "recipe.yaml"
    train(recipe, *words, "train.total_steps=8", "train.sequence_parallel=2", ranks=2, ds_config="zero2")
    said = train(recipe, *words, "train.total_steps=12", ranks=1)
    assert "after step 8" in said
    assert len({line["t_min"] for line in train_records(tmp_path / "alone" / "run")}) > 1  # an interval was found
    alone, shared = curve(tmp_path / "alone" / "run"), curve(tmp_path / "shared" / "run")
    assert len(alone) == len(shared) == 12
    for step, (loss, norm) in alone.items():
        assert shared[step][0] == pytest.approx(loss, abs=1e-5), step
        assert shared[step][1] == pytest.approx(norm, rel=1e-4), step
