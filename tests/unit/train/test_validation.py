"""The validation bound of a run is the bound that `run.py evaluate` gives, and costs the run no number."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.check import check_run
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, RunConfig
from bd3_ds.diffusion.likelihood import Estimator
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.perplexity import evaluate_pack
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World
from bd3_ds.train.step import Stepper
from bd3_ds.train.validation import Validation, validation_set
from tests.helpers.engine import OneProcess
from tests.helpers.tiny import LENGTH, tiny_export, tiny_pack, tiny_run
from tests.unit.train.test_padded_runs import padded_pack

CPU = torch.device("cpu")


class Part(World):
    """A rank whose sums over all ranks are its own share."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def validation(run: RunConfig, rank: int = 0, ranks: int = 1) -> Validation:
    """On the weights of the run's export, as one of so many ranks."""
    model = load_model(find_export(str(Path(run.run_dir))), CPU)
    engine: Any = OneProcess(model)
    assert run.model.mask_id is not None
    return Validation(Stepper(run, Part(rank, ranks, rank, ranks, CPU), engine, engine, run.model.mask_id, None))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "size"), [(AR, None), (MDLM, None), (SEDD, None), (BD3, 4), (BD3, 1)])
def test_it_is_the_bound_of_evaluate(tmp_path: Path, name: str, size: int | None, padded: bool) -> None:
    estimator = "mc" if name == SEDD else "exact" if size == 1 else "stratified"
    if padded:
        padded_pack(tmp_path / "valid", [16, 4, 12, 1, 8, 3, 16])
    words = {"objective__name": name, "objective__block_size": size, "eval__estimator": estimator}
    run = tiny_run(tmp_path, train__validate_sequences=6, **words)
    export = find_export(str(tiny_export(run)))
    found = validation(run).run(3)
    expected = evaluate_pack(
        load_model(export, CPU),
        export,
        tmp_path / "valid",
        "valid",
        Estimator(estimator, run.eval.views, at_once=8),
        max_chunks=6,
    )
    assert (found.step, found.set, found.sequences) == (3, "valid", expected["chunks"])
    assert (found.estimator, found.tokens) == (expected["estimator"], expected["tokens"])
    assert found.nelbo == pytest.approx(expected["nelbo"], rel=1e-5)
    assert found.ppl == pytest.approx(expected["ppl"], rel=1e-4)
    assert found.stderr == pytest.approx(expected["stderr"], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_and_micro_batches_share_the_same_draws(tmp_path: Path, ranks: int, micro_batch: int) -> None:
    """The shares of the ranks, some of which have nothing left to score, add up to the value of one."""
    whole_run = tiny_run(tmp_path, train__validate_sequences=7, eval__views=1)
    tiny_export(whole_run)
    whole = validation(whole_run).run(2)
    train = dataclasses.replace(whole_run.train, micro_batch=micro_batch)
    run = dataclasses.replace(whole_run, train=train)
    parts = [validation(run, rank, ranks).run(2) for rank in range(ranks)]
    assert sum(part.nelbo for part in parts) == pytest.approx(whole.nelbo, rel=1e-6)


def test_one_view_tells_its_error_from_the_spread_of_sequences(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, eval__views=1)
    export = find_export(str(tiny_export(run)))
    how = Estimator("stratified", views=1, at_once=8)
    expected = evaluate_pack(load_model(export, CPU), export, tmp_path / "valid", "valid", how)
    assert validation(run).run(1).stderr == pytest.approx(expected["stderr"], rel=1e-5)


def test_it_repeats_itself_and_moves_no_random_number(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    tiny_export(run)
    held = validation(run)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = held.run(1), held.run(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert dataclasses.replace(again, step=1) == first
    assert held._stepper.engine.module.training


def test_the_stage_decides_the_block_size(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "objective.block_schedule={0: [16], 3: [4]}")
    tiny_export(run)
    held = validation(run)
    assert [held.run(step).block_size for step in (1, 3, 4)] == [16, 16, 4]


@pytest.mark.parametrize(
    ("words", "expected", "due"),
    [
        ([], "valid", [4]),
        (["train.validate_every=3"], "valid", [3, 4]),
        (["train.validate_every=null"], None, []),
        (["train.validate_every=0"], None, []),
        (["train.validate_set=other", "train.validate_every=2"], "other", [2, 4]),
    ],
)
def test_when_and_on_what(tmp_path: Path, words: list[str], expected: str | None, due: list[int]) -> None:
    tiny_pack(tmp_path / "other", seed=2)
    run = tiny_run(tmp_path, f"eval.sets.other={tmp_path / 'other'}", *words)
    tiny_export(run)
    assert validation_set(run) == expected
    held = validation(run)
    assert [step for step in range(1, 5) if held.is_due(step, last=step == 4)] == due


def test_without_sets_there_is_none(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    tiny_export(run)
    run = dataclasses.replace(run, eval=dataclasses.replace(run.eval, sets={}))
    assert validation_set(run) is None and not validation(run).is_due(4, last=True)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("train.validate_set=vaild", "train.validate_set=vaild is not one of eval.sets; did you mean 'valid'?"),
        ("train.validate_every=-1", "train.validate_every=-1 must be finite and not negative"),
        ("train.validate_sequences=0", "train.validate_sequences=0 must be finite and above 0"),
    ],
)
def test_what_cannot_be(tmp_path: Path, word: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        check_run(tiny_run(tmp_path, word), 1)
    assert any(sentence in message for message in error.value.messages), error.value.messages


def test_a_set_with_nothing_to_score_is_refused(tmp_path: Path) -> None:
    padded_pack(tmp_path / "valid", [1, 1, 16])
    run = tiny_run(tmp_path, train__validate_sequences=2)
    tiny_export(run)
    with pytest.raises(UserError, match=r"first 2 sequences of eval.sets.valid=.*raise train.validate_sequences"):
        validation(run)


def test_a_bound_that_is_not_finite_is_null_on_record(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    tiny_export(run)
    found = dataclasses.replace(validation(run).run(1), nelbo=math.nan, stderr=math.nan)
    record = found.record(1.0)
    assert (record["nelbo"], record["stderr"], record["ppl"]) == (None, None, None)
    assert record["tokens"] == 8 * (LENGTH - 1)
