"""The validation bound under the real launcher: ranks share it, `run.py evaluate` gives it, the run is the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bd3_ds.checkpoint.export import find_export, load_weights
from bd3_ds.diffusion.likelihood import Estimator
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.perplexity import evaluate_pack
from tests.helpers.launch import curve, train, validation_curve
from tests.helpers.tiny import tiny_run

# Without an average, exports hold the weights as they stand.
WORDS = ("optim.ema_decay=0", "train.validate_sequences=7")


def test_two_ranks_and_evaluate_agree_and_the_run_is_the_same(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    one, two, without = (tmp_path / name for name in ("one", "two", "without"))
    train(recipe, f"run_dir={one}", *WORDS, "train.validate_every=2", ranks=1, ds_config="zero0")
    said = train(recipe, f"run_dir={two}", *WORDS, "train.validate_every=2", ds_config="zero3")
    train(recipe, f"run_dir={without}", *WORDS, "train.validate_every=0", ds_config="zero3")

    ours, theirs = validation_curve(two), validation_curve(one)
    assert sorted(ours) == sorted(theirs) == [2, 4]
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step

    for step in (2, 4):
        export = find_export(str(two / "exports" / f"step-{step:08d}"))
        device = torch.device("cpu")
        expected = evaluate_pack(
            load_model(export, device),
            export,
            tmp_path / "valid",
            "valid",
            Estimator("stratified", export.run.eval.views, at_once=8),
            max_chunks=7,
        )
        assert ours[step] == pytest.approx((expected["nelbo"], expected["stderr"]), rel=1e-5)

    assert curve(without) == curve(two) and validation_curve(without) == {}
    weights, same = (load_weights(find_export(str(path))) for path in (two, without))
    assert all(torch.equal(weights[name], same[name]) for name in weights | same)

    final = f"{ours[4][0]:.4f}"
    assert f"step 4: validation nelbo {final}" in said
    assert "finished: 4 steps and 256 tokens" in said
    assert f"validation nelbo {final}" in said.partition("finished: ")[2]
    assert f"export (averaged weights): {two}/exports/step-00000004" in said
    assert re.search(rf"run\.(py|sh) evaluate {re.escape(str(two))} .*run\.(py|sh) report {re.escape(str(two))}", said)
