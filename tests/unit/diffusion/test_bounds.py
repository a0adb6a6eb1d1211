"""The entry of an objective names its bound, so that one of another kind is evaluated and validated like ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.registries import BOUNDS, OBJECTIVES, Objective
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD
from bd3_ds.diffusion.likelihood import Bound, Estimator, Texts
from bd3_ds.diffusion.objectives import mdlm
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.perplexity import evaluate_pack
from bd3_ds.runtime.errors import UserError
from tests.helpers.tiny import tiny_export, tiny_run
from tests.unit.train.test_validation import CPU, validation


def two_nats(network: Any, texts: Texts, block_size: int, mask_id: int, estimator: Estimator) -> Bound:
    """Whatever the network says, two nats a scored token."""
    scored = texts.scored_positions()
    return Bound(2.0 * scored, torch.zeros(len(texts)), 0, int(scored.sum()))


@pytest.fixture
def third() -> Iterator[None]:
    """An objective whose bound is of a kind of its own."""
    BOUNDS.register("two nats", two_nats)
    OBJECTIVES.register("third", Objective("a model", mdlm.loss, bound="two nats"))
    yield
    OBJECTIVES.remove("third")
    BOUNDS.remove("two nats")


@pytest.mark.usefixtures("third")
def test_a_bound_of_another_kind_is_evaluated_and_validated(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, objective__name="third", objective__block_size=None)
    export = find_export(str(tiny_export(run)))
    how = Estimator("stratified", at_once=8)
    record = evaluate_pack(load_model(export, CPU), export, tmp_path / "valid", "valid", how)
    assert record["nelbo"] == validation(run).run(1).nelbo == 2.0
    assert record["ppl"] == math.exp(2.0)


def test_every_objective_names_a_bound() -> None:
    assert {OBJECTIVES[name].bound for name in (AR, BD3, MDLM, SEDD)} == set(BOUNDS)
    with pytest.raises(UserError, match="bound=autoregresive is unknown; did you mean"):
        BOUNDS["autoregresive"]
