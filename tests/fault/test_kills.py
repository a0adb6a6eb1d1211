"""Random kills lose nothing, also where the run goes on in another shape; a few of the benchmark's thirty."""

import random

import pytest

from benchmarks.kills import chains, kills
from tests.helpers.tiny import tiny_run


@pytest.mark.slow
def test_killed_at_random_it_is_the_undisturbed_run(tmp_path):
    tiny_run(tmp_path)
    result = kills(tmp_path, count=3, steps=60, rng=random.Random())
    assert len(result["kills"]) == 3 and result["lost"] == 0, result
    assert result["same_losses"] and result["same_weights"], result


@pytest.mark.slow
def test_killed_and_continued_on_other_ranks_and_stages_it_has_the_same_losses(tmp_path):
    tiny_run(tmp_path)
    shapes = [(2, "zero2"), (1, "zero3"), (2, "zero1")]
    (result,) = chains(tmp_path, {"ranks and stages": shapes}, ("fp32",), steps=30)
    assert result["loss_difference"] < 1e-5, result
