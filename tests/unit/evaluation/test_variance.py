"""Variance of the NELBO and of its gradient over batches: definitions, the command, the worker's scalars."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import run as entry
from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.schema import RunConfig, WeightConfig
from bd3_ds.data.pack import open_pack
from bd3_ds.diffusion.likelihood import Texts
from bd3_ds.diffusion.noise import make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.variance import BatchPlan, variances
from bd3_ds.evaluation.worker.worker import Worker
from bd3_ds.model.dit import DiT, as_denoiser
from bd3_ds.runtime.errors import run_command
from bd3_ds.runtime.rng import Purpose, generator, integer_seed
from tests.helpers.tiny import tiny_export, tiny_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, DiT, torch.Tensor]:
    """A tiny run with an export, its network, and the tokens that batches come from."""
    run = tiny_run(tmp_path_factory.mktemp("variance"), "eval.variance_batches=6")
    model = load_model(find_export(str(tiny_export(run))), CPU)
    return run, model, torch.from_numpy(open_pack(run.data.train).all_tokens())


def test_definitions(scene) -> None:
    """Straight from the formulas: batch estimates, their variance, eq. (10) from whole gradients."""
    run, model, tokens = scene
    batches, sequences = 5, 8
    measured = variances(model, run, Texts(tokens), BatchPlan(batches, sequences, at_once=3, gradient=True))
    seed = integer_seed(0, Purpose.VARIANCE)
    estimates, gradients = [], []
    for m in range(batches):
        rows = generator(0, Purpose.VARIANCE, m).integers(len(tokens), size=sequences)
        slots = np.arange(sequences)
        u, draws = stratified_times(seed, m, slots, sequences, 4), mask_draws(seed, m, slots, tokens.shape[1])
        noise = make_noise(u, draws, make_proposal(run.objective.schedule), WeightConfig("elbo", 0.0))
        model.zero_grad()
        loss = training_loss("bd3", as_denoiser(model, 4), tokens[rows], noise, run.model.mask_id)
        loss.loss.backward()
        estimates.append(float(loss.nelbo))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
    stack = torch.stack(gradients)
    assert measured.nelbo == pytest.approx(np.mean(estimates), rel=1e-6)
    assert measured.var_nelbo == pytest.approx(np.var(estimates, ddof=1), rel=1e-4)
    assert measured.var_nelbo_stderr == pytest.approx(measured.var_nelbo * math.sqrt(2 / 4), rel=1e-6)
    expected = float((stack - stack.mean(0)).square().sum() / (batches - 1))
    assert measured.var_gradient == pytest.approx(expected, rel=1e-3)


def test_independent_blocks_make_the_batch_estimate_steadier(scene) -> None:
    """A batch's variance is about a block's over the number of blocks, as stratification allows; a clip lowers both."""
    run, model, tokens = scene
    whole, clipped = (
        variances(model, run, Texts(tokens), BatchPlan(60, 16, at_once=16), interval=interval)
        for interval in (None, (0.45, 0.95))
    )
    assert 0.5 < whole.var_nelbo / (whole.var_block / (16 * 4)) < 2
    assert clipped.var_block < 0.5 * whole.var_block
    assert clipped.var_nelbo < whole.var_nelbo
    assert whole.var_gradient is None


def test_command(scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _, _ = scene
    file = tmp_path / "variance.json"
    words = ["variance", run.run_dir, "--batches", "4", "--batch", "4", "--intervals", "0.001-1,0.3-0.8", "--gradients"]
    assert run_command(entry.main, [*words, "--json", str(file), "objective.weight.name=edm"]) == 0
    records = json.loads(file.read_text())
    assert [(record["t_min"], record["t_max"]) for record in records] == [(0.001, 1.0), (0.3, 0.8)]
    assert all(record["var_gradient"] > 0 and record["batches"] == 4 for record in records)
    assert "weight edm" in capsys.readouterr().out
    for more, part in (
        (["model.layers=3"], "model.layers cannot be changed here"),
        (["objective.schedule.nam=x"], "did you mean 'objective.schedule.name'?"),
        (["--batches", "1"], "a variance needs at least 2 batches"),
        (["--intervals", "0.8-0.3"], "'0.8-0.3' is not an interval"),
        (["--intervals", "0.5"], "'0.5' is not an interval"),
        (["--set", "nowhere"], "nowhere"),
    ):
        assert run_command(entry.main, ["variance", run.run_dir, *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and part in said


def test_worker_writes_them_beside_the_perplexity(scene) -> None:
    """records/eval.jsonl and TensorBoard, read back with its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _, _ = scene
    (Path(run.run_dir) / "run.yaml").write_text((find_export(run.run_dir).path / "config.yaml").read_text())
    worker = Worker(Path(run.run_dir), CPU, 0.1)
    worker.follow(once=True)
    worker.close()
    record = json.loads((Path(run.run_dir) / "records/eval.jsonl").read_text().splitlines()[0])
    events = EventAccumulator(str(Path(run.run_dir) / "tensorboard"))
    events.Reload()
    for key in ("var_nelbo", "var_block", "var_gradient"):
        assert record[key] > 0
        assert events.Scalars(f"eval/valid/{key}")[0].value == pytest.approx(record[key], rel=1e-6)
