"""`data.document_mask` in a run: loading, training, evaluation and continuation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.load import to_yaml
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, RunConfig, block_size
from bd3_ds.data.micro_batch import MicroBatch
from bd3_ds.data.pack import open_pack
from bd3_ds.data.share import Share
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.chunked_head import HeadLoss
from bd3_ds.diffusion.likelihood import Estimator, Texts
from bd3_ds.diffusion.noise import make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.diffusion.score_entropy import ScoreNats
from bd3_ds.diffusion.score_entropy_bound import score_entropy_bound
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.perplexity import evaluate_pack
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World
from bd3_ds.train.preflight import preflight
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import Stepper
from tests.helpers.documents import CASES, document_pack, each_alone, numbers
from tests.helpers.engine import OneProcess
from tests.helpers.readers import open_loader
from tests.helpers.tiny import LENGTH, tiny_export, tiny_run

CPU = torch.device("cpu")
TOLERANCE = 3e-6  # relative, of one bound computed in two ways in fp32


def test_loader_numbers_documents(tmp_path: Path) -> None:
    starts = [[0, 4, 12], [], [3], [15], [0], [1, 2, 3], [8], [0, 5]] * 2
    pack = open_pack(document_pack(tmp_path / "train", starts))
    assert pack.all_documents().tolist() == numbers(starts).tolist()
    assert pack.all_documents(3).tolist() == numbers(starts[:3]).tolist()
    of = {tuple(tokens): row for tokens, row in zip(pack.all_tokens().tolist(), numbers(starts).tolist(), strict=True)}
    assert len(of) == len(starts)

    for asked in (True, False):
        data = tiny_run(tmp_path, data__document_mask=str(asked).lower()).data
        batches = list(itertools.islice(open_loader(data, Share(0, 1, 1, 4, 8)), 4))
        assert sorted(tuple(row) for batch in batches for row in batch.tokens.tolist()) == sorted(of)
        for batch in batches:
            if not asked:
                assert batch.documents is None
                continue
            assert batch.documents is not None and batch.documents.dtype == torch.int64
            assert batch.documents.tolist() == [of[tuple(row)] for row in batch.tokens.tolist()]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """Makes runs of an objective and block size; the pack `valid-N` has the starts of CASES[N]."""
    directory = tmp_path_factory.mktemp("documents")
    for number, (_, _, starts) in enumerate(CASES):
        document_pack(directory / f"valid-{number}", starts)

    def make(objective: str, size: int, **overrides: Any) -> RunConfig:
        overrides = {
            "objective__name": objective,
            "objective__block_size": size if objective == BD3 else None,
        } | overrides
        estimator = "mc" if objective == SEDD else "stratified"
        return tiny_run(directory, eval__estimator=estimator, run_dir=directory / f"{objective}-{size}", **overrides)

    return make


def pack_of(run: RunConfig, number: int) -> Path:
    return Path(run.data.train).parent / f"valid-{number}"


def texts_of(run: RunConfig, number: int) -> Tensor:
    return torch.from_numpy(open_pack(pack_of(run, number)).all_tokens())


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(CASES)))
def test_perplexity_is_that_of_each_document(scene: Callable[..., RunConfig], number: int) -> None:
    objective, size, starts = CASES[number]
    run = scene(objective, size, data__document_mask="true")
    export = find_export(str(tiny_export(run)))
    model = load_model(export, CPU)
    x0 = texts_of(run, number)
    mask_id = run.model.mask_id
    assert mask_id is not None
    estimator = {AR: "exact", BD3: "exact", MDLM: "stratified", SEDD: "mc"}[objective]

    def denoiser(clean: Tensor) -> likelihood.ViewDenoiser:
        x0_seen = clean if objective == BD3 else None

        def denoise(x_t: Tensor, at: Tensor, read: SubsNats) -> tuple[Tensor, Tensor]:
            return read.of_logits(each_alone(model, x_t.flatten(0, 1), x0_seen, size, starts).flatten(0, 1)[at])

        return denoise

    def causal(clean: Tensor, at: Tensor, read: SubsNats) -> tuple[Tensor, Tensor]:
        return read.of_logits(each_alone(model, clean, None, size, starts).flatten(0, 1)[at])

    def score(x_t: Tensor, sigma: Tensor, at: Tensor, read: ScoreNats) -> tuple[Tensor, Tensor]:
        return read.of_logits(each_alone(model, x_t, None, size, starts, sigma).flatten(0, 1)[at])

    if objective == AR:
        expected = likelihood.autoregressive(causal, Texts(x0), mask_id)
    elif objective == SEDD:
        expected = score_entropy_bound(score, Texts(x0), mask_id, 2, 5)
    elif objective == BD3:
        expected = likelihood.exact(denoiser, Texts(x0), size, mask_id)
    else:
        expected = likelihood.stratified(denoiser, Texts(x0), size, mask_id, 2, 5)

    def evaluated(document_mask: bool, batch: int) -> float:
        data = dataclasses.replace(run.data, document_mask=document_mask)
        changed = dataclasses.replace(export, run=dataclasses.replace(run, data=data))
        how = Estimator(estimator, views=2, seed=5, at_once=batch)
        return float(evaluate_pack(model, changed, pack_of(run, number), "valid", how)["nelbo"])

    by_hand = float(expected.nelbo.double().sum()) / (len(x0) * (LENGTH - 1))
    for batch in (1, 64):
        assert evaluated(True, batch) == pytest.approx(by_hand, rel=TOLERANCE)
    assert abs(evaluated(False, 64) - by_hand) > 10 * TOLERANCE * by_hand


@pytest.mark.parametrize("number", range(len(CASES)))
def test_training_is_on_each_document(scene: Callable[..., RunConfig], number: int) -> None:
    """The loss and gradient of a step are those of its documents, each run alone."""
    objective, size, starts = CASES[number]
    run = scene(objective, size, train__global_batch=3, train__micro_batch=3)
    model = load_model(find_export(str(tiny_export(run))), CPU)
    mask_id = run.model.mask_id
    assert mask_id is not None and block_size(run) == size
    x0, slots, engine = texts_of(run, number), np.arange(3), OneProcess(model)
    stepper = Stepper(run, World(0, 1, 0, 1, CPU), engine, engine, mask_id, None)

    def step(documents: Tensor | None) -> tuple[float, Tensor]:
        model.zero_grad()
        loss = stepper.step(iter([MicroBatch(x0, slots, 0.0, documents)]), TrainState(), False).loss
        return loss, gradient()

    def gradient() -> Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def alone(
        x_t: Tensor, clean: Tensor | None, *, sigma: Tensor | None, at: Tensor, read: HeadLoss
    ) -> tuple[Tensor, Tensor]:
        logits = each_alone(model, x_t, clean if objective == BD3 else None, size, starts, sigma)
        return read.of_logits(logits.flatten(0, 1)[at])

    noise = None
    if objective != AR:
        u = stratified_times(run.seed, 0, slots, 3, LENGTH // size)
        draws = mask_draws(run.seed, 0, slots, LENGTH)
        noise = make_noise(u, draws, make_proposal(run.objective.schedule), run.objective.weight)
    loss, found = step(numbers(starts))
    without, _ = step(None)
    model.zero_grad()
    expected = training_loss(objective, alone, x0, noise, mask_id)
    expected.loss.backward()
    assert loss == pytest.approx(expected.loss.item(), rel=TOLERANCE)
    torch.testing.assert_close(found, gradient(), rtol=1e-3, atol=1e-5)
    assert abs(without - loss) > 10 * TOLERANCE * loss


def test_a_continued_run_keeps_its_documents(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    Path(run.run_dir).mkdir()
    (Path(run.run_dir) / "run.yaml").write_text(to_yaml(run))
    preflight(run, 1)
    with pytest.raises(UserError, match=r"data\.document_mask was False"):
        preflight(tiny_run(tmp_path, data__document_mask="true"), 1)
