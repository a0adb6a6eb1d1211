"""Impossible values under `objective`: one sentence each, exit code 2, before torch is needed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import run as entry
from bd3_ds.runtime.errors import run_command
from tests.helpers.tiny import tiny_run

CASES = [
    ("objective.schedule.name=gausian", "did you mean 'gaussian'?"),
    ("objective.schedule.t_max=nan", "t_max=nan must satisfy 0 <= t_min <= t_max <= 1"),
    ("objective.schedule.defensive=1", "objective.schedule.defensive=1.0 must lie in [0, 1)"),
    ("objective.schedule.gaussian.sigma=0", "objective.schedule.gaussian.sigma=0.0 must lie in [0.001, 10]"),
    ("objective.schedule.gaussian.mu=1.5", "objective.schedule.gaussian.mu=1.5 must lie in [0, 1]"),
    ("objective.schedule.bimodal.w1=1", "objective.schedule.bimodal.w1=1.0 must lie in (0, 1)"),
    ("objective.schedule.bimodal.mu2_end=-1", "objective.schedule.bimodal.mu2_end=-1.0 must lie in [0, 1]"),
    ("objective.schedule.t_min=1 objective.schedule.defensive=0.1", "draws a single rate"),
    ("objective.views=0", "objective.views=0 must be finite and above 0"),
    ("objective.name=mdlm objective.block_size=null objective.views=4", "raise train.micro_batch instead"),
    ("objective.weight.name=edn", "did you mean 'edm'?"),
    ("objective.weight.sigmoid_k=inf", "objective.weight.sigmoid_k=inf must lie in [-50, 50]"),
    ("objective.frequency.power=2", "objective.frequency.power=2.0 must lie in [0, 1]"),
    ("objective.frequency.curriculum_steps=-1", "must be finite and not negative"),
    ("objective.clip_search.method=grd", "did you mean 'grid'?"),
    ("objective.clip_search.explore=0", "objective.clip_search.explore=0.0 must lie in (0, 1)"),
    ("objective.clip_search.every=0", "objective.clip_search.every=0 must be finite and above 0"),
    ("objective.clip_search.widths=0.5", "must be a list such as [0.5, 0.9]"),
    ("objective.clip_search.widths=[0.5,2]", "objective.clip_search.widths holds 2.0"),
    ("objective.clip_search.method=grid objective.clip_search.set=no", "is not one of eval.sets (valid)"),
    ("objective.clip_search.method=grid objective.clip_search.sequences=1", "x 1 ranks = 2, what one round"),
    ("objective.clip_search.method=moments objective.schedule.t_min=1.0", "set objective.schedule.t_min=0.001"),
    ("objective.clip_search.method=moments objective.schedule.defensive=0.1", "objective.schedule.defensive=0.1 to 0"),
    ("objective.clip_search.method=moments objective.clip_search.widths=[]", "widths is empty"),
    ("objective.schedule.t_min=1 objective.weight.name=fm", "objective.weight.name=fm is but a factor; set it to elbo"),
    ("objective.block_size=1 objective.frequency.power=0.1", "blocks of 1 have but one; set it to 0"),
    ("'objective.block_schedule={0: [8, 16], 2: [4]}'", "exports of the stage from step 0 on"),
    ("'objective.block_schedule={0: [16], 2: [4]}' eval.estimator=exact", "bd3 denoises all 16 tokens of a sequence"),
    ("'objective.block_schedule={0: 4}'", "'step: [block sizes]' pairs such as"),
    ("'objective.block_schedule={0:4}'", "YAML needs a space after each ':'"),
    ("'objective.block_schedule={2: [4]}'", "begins at step 2"),
    ("'objective.block_schedule={0: [4], -1: [4]}'", "has the step -1; steps are counted from 0"),
    ("'objective.block_schedule={0: []}'", "gives no block size at step 0"),
    ("'objective.block_schedule={0: [5]}'", "it must divide data.length=16"),
    ("'objective.block_schedule={0: [8]}'", "make it one of them"),
    (
        "objective.name=mdlm objective.block_size=null 'objective.block_schedule={0: [4]}'",
        "objective.block_schedule belongs to objective.name=bd3, not mdlm; set it to {}",
    ),
    (
        "objective.name=ar objective.block_size=null objective.schedule.name=cosine",
        "objective.name=ar masks nothing: set it to log_linear",
    ),
    ("objective.block_size=null 'objective.block_schedule={0: [8]}'", "objective.block_size=null (all 16 tokens) is"),
    ("objective.name=ar objective.block_size=null objective.frequency.power=0.1", "objective.name=ar masks nothing"),
    (
        "objective.name=sedd objective.block_size=null eval.estimator=mc objective.frequency.power=0.1",
        "objective.name=sedd is conditioned on one noise level",
    ),
    ("objective.name=sedd objective.block_size=null eval.estimator=report", "use mc"),
    ("eval.variance_batches=1", "eval.variance_batches=1 has no variance"),
    ("data.document_mask=maybe", "data.document_mask=maybe"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad-diffusion")
    tiny_run(directory)
    return directory / "recipe.yaml"


@pytest.mark.parametrize(("words", "part"), CASES)
def test_sentence(words: str, part: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(entry.main, ["check", str(recipe), *shlex.split(words)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
    assert part in said.err


def test_plan_says_what_is_masked(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean rate, the all-masked share, a warning where it vanishes, the stages; and the picture."""
    plot = tmp_path / "schedule.png"
    stages = "objective.block_schedule={0: [16], 2: [4, 8]}"
    narrow = ["objective.schedule.name=gaussian", "objective.schedule.gaussian.mu=0.2"]
    assert run_command(entry.main, ["check", str(recipe), stages, *narrow, "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "from step 2 on: block size 4 or 8" in said
    assert "block size 16: 20." in said and "warning: sampling starts" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run_command(entry.main, ["check", str(recipe), "--plot", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
    ar = ["objective.name=ar", "objective.block_size=null"]
    assert run_command(entry.main, ["check", str(recipe), *ar, "--plot", str(plot)]) == 2
    assert "--plot draws a noise schedule" in capsys.readouterr().err
