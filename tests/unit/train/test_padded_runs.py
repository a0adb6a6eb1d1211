"""Padded packs in training and evaluation: what is divided by, and by how much."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, RunConfig
from bd3_ds.data.data_facts import read_data_facts
from bd3_ds.data.micro_batch import MicroBatch
from bd3_ds.data.pack import open_pack
from bd3_ds.data.share import Share
from bd3_ds.diffusion.likelihood import Estimator, Texts
from bd3_ds.diffusion.noise import scored_positions
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.perplexity import bound_of, evaluate_pack
from bd3_ds.evaluation.unigram import unigram_perplexity
from bd3_ds.evaluation.variance import BatchPlan, variances
from bd3_ds.model.dit import DiT
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World
from bd3_ds.train.clip_search import ClipSearch
from bd3_ds.train.state import TrainState
from bd3_ds.train.step import Stepper, StepResult
from data_prep.pack_writer import write_pack
from tests.helpers.engine import OneProcess
from tests.helpers.readers import open_loader
from tests.helpers.tiny import LENGTH, tiny_export, tiny_pack, tiny_run, tiny_text, tiny_tokenizer

CPU = torch.device("cpu")
COUNTS = [16, 4, 12, 1, 8, 3, 16, 5]  # tokens of the texts, one a sequence
OBJECTIVES = [(AR, None), (MDLM, None), (SEDD, None), (BD3, 4)]


def padded_pack(directory: Path, counts: list[int]) -> Path:
    """Real text, one document a sequence of `counts` tokens, then padding."""
    tokenizer = tiny_tokenizer()
    ids = np.concatenate([np.array(part) for part in tokenizer.encode_batch(tiny_text()) if part])
    rows = np.resize(ids, (len(counts), LENGTH))
    rows[np.arange(LENGTH) >= np.array(counts)[:, None]] = tokenizer.pad_id
    pads = [np.array([count] if count < LENGTH else [], np.int64) for count in counts]
    chunks = ((row, np.array([0]), pad) for row, pad in zip(rows, pads, strict=True))
    write_pack(directory, chunks, tokenizer, LENGTH, name=directory.name)
    return directory


def padded_run(directory: Path, objective: str, size: int | None, **more: Any) -> RunConfig:
    for name in ("train", "valid"):
        if not (directory / name).exists():
            padded_pack(directory / name, COUNTS)
    estimator = "mc" if objective == SEDD else "stratified"
    given = {"objective__name": objective, "objective__block_size": size, "eval__estimator": estimator} | more
    return tiny_run(directory, train__global_batch=8, **given)


def step(run: RunConfig, model: DiT, micro: int, order: list[int]) -> tuple[StepResult, Tensor]:
    """One step on the whole pack, dealt out in this order to micro-batches; and the gradient."""
    pack = open_pack(run.data.train)
    tokens, documents = torch.from_numpy(pack.all_tokens()), torch.from_numpy(pack.all_documents(apart=False))
    parts = [order[i : i + micro] for i in range(0, len(order), micro)]
    engine: Any = OneProcess(model, accumulation=len(parts))
    model.zero_grad()
    stepper = Stepper(run, World(0, 1, 0, 1, CPU), engine, engine, mask_of(run), None, scored_tokens(run))
    stepper.accumulation = len(parts)
    batches = (MicroBatch(tokens[part], np.array(part), 0.0, documents[part]) for part in parts)
    result = stepper.step(iter(batches), TrainState(), False)
    return result, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def scored_tokens(run: RunConfig) -> float:
    return read_data_facts(run.data).scored_tokens


def mask_of(run: RunConfig) -> int:
    assert run.model.mask_id is not None
    return run.model.mask_id


@pytest.mark.parametrize(("objective", "size"), OBJECTIVES)
def test_how_a_padded_batch_is_dealt_out_does_not_matter(tmp_path: Path, objective: str, size: int | None) -> None:
    run = padded_run(tmp_path, objective, size)
    model = load_model(find_export(str(tiny_export(run))), CPU)
    whole, gradient = step(run, model, 8, list(range(8)))
    parts, same = step(run, model, 1, [3, 1, 0, 2, 7, 6, 5, 4])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5) and parts.nelbo == pytest.approx(whole.nelbo, rel=1e-5)
    torch.testing.assert_close(same, gradient, rtol=1e-3, atol=1e-5)
    if objective == AR:  # the mean over the tokens that there are
        with torch.no_grad():
            pack = open_pack(run.data.train)
            documents = torch.from_numpy(pack.all_documents(apart=False))
            bound = bound_of(model, run, Texts(torch.from_numpy(pack.all_tokens()), documents), Estimator("exact"))
        assert bound.tokens == sum(COUNTS) - 8
        assert whole.loss == pytest.approx(bound.total / bound.tokens, rel=1e-5)


def test_batches_of_few_tokens_weigh_less(tmp_path: Path) -> None:
    """The record is nats a token of the batch; the gradient is that of the pack's mean sequence."""
    run = padded_run(tmp_path, AR, None, train__total_steps=4)
    model = load_model(find_export(str(tiny_export(run))), CPU)
    assert scored_tokens(run) == (sum(COUNTS) - 8) / 8
    engine: Any = OneProcess(model)
    stepper = Stepper(run, World(0, 1, 0, 1, CPU), engine, engine, mask_of(run), None, scored_tokens(run))
    other = Stepper(run, World(0, 1, 0, 1, CPU), engine, engine, mask_of(run), None)
    pack = open_pack(run.data.train)
    tokens, documents = (torch.from_numpy(x) for x in (pack.all_tokens(), pack.all_documents(apart=False)))

    def results(of: Stepper) -> tuple[float, Tensor]:
        model.zero_grad()
        of.accumulation = 1
        loss = of.step(iter([MicroBatch(tokens, np.arange(8), 0.0, documents)]), TrainState(), False).loss
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (loss, gradient), (same_loss, smaller) = results(stepper), results(other)
    assert loss == pytest.approx(same_loss, rel=1e-6)
    torch.testing.assert_close(gradient * scored_tokens(run) / (LENGTH - 1), smaller, rtol=1e-4, atol=1e-7)


def test_mean_sequence_of_mixed_packs(tmp_path: Path) -> None:
    """A quarter of the samples is padded: 8 of them have as many tokens as COUNTS says."""
    run = tiny_run(tmp_path)
    padded_pack(tmp_path / "padded", COUNTS)
    assert scored_tokens(run) == LENGTH - 1
    mixed = tiny_run(tmp_path, f"data.mix={{{tmp_path / 'padded'}: 0.25}}")
    assert scored_tokens(mixed) == pytest.approx(0.75 * (LENGTH - 1) + 0.25 * (sum(COUNTS) - 8) / 8, rel=0.01)


def test_loader_tells_of_padding(tmp_path: Path) -> None:
    run = padded_run(tmp_path, BD3, 4)
    batch = next(iter(open_loader(run.data, Share(0, 1, 1, 8, 8))))
    assert batch.documents is not None and batch.documents.max() == 0
    assert sorted((batch.documents == 0).sum(1).tolist()) == sorted(COUNTS)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize(("objective", "size"), [(AR, None), (BD3, 4), (BD3, 1)])
def test_perplexity_is_that_of_the_texts(tmp_path: Path, objective: str, size: int | None, batch: int) -> None:
    whole = [count for count in COUNTS if size is None or count % size == 0]  # of blocks
    padded_pack(tmp_path / "valid", whole)
    run = padded_run(tmp_path, objective, size)
    export = find_export(str(tiny_export(run)))
    model = load_model(export, CPU)
    how = Estimator("exact", at_once=batch)
    record = evaluate_pack(model, export, tmp_path / "valid", "valid", how)
    total, tokens = 0.0, torch.from_numpy(open_pack(tmp_path / "valid").all_tokens())
    for row, count in zip(tokens, whole, strict=True):
        if count > 1:
            total += bound_of(model, run, Texts(row[None, :count]), Estimator("exact")).total
    assert record["tokens"] == sum(whole) - len(whole)
    assert record["nelbo"] == pytest.approx(total / record["tokens"], rel=1e-5)


@pytest.mark.parametrize(("objective", "size"), OBJECTIVES[1:])
@pytest.mark.parametrize("estimator", ["stratified", "mc", "report"])
def test_sampled_perplexities_count_text_alone(
    tmp_path: Path, objective: str, size: int | None, estimator: str
) -> None:
    if objective == SEDD and estimator != "mc":
        return
    run = padded_run(tmp_path, objective, size)
    export = find_export(str(tiny_export(run)))
    how = Estimator(estimator, views=2, at_once=8)
    record = evaluate_pack(load_model(export, CPU), export, tmp_path / "valid", "valid", how)
    assert record["tokens"] == sum(COUNTS) - 8 and math.isfinite(record["nelbo"])
    assert math.isfinite(record.get("report_loss", 0.0))


def test_a_set_without_a_scored_token_is_refused(tmp_path: Path) -> None:
    padded_pack(tmp_path / "valid", [1, 1])
    run = padded_run(tmp_path, BD3, 4)
    export = find_export(str(tiny_export(run)))
    how = Estimator("exact", at_once=8)
    with pytest.raises(UserError, match=r"set valid in .* has nothing to score"):
        evaluate_pack(load_model(export, CPU), export, tmp_path / "valid", "valid", how)


def test_a_run_without_a_scored_token_is_refused(tmp_path: Path) -> None:
    padded_pack(tmp_path / "train", [1, 1])
    with pytest.raises(UserError, match=r"data\.train=.* has nothing to learn"):
        scored_tokens(padded_run(tmp_path, BD3, 4))


def test_unigrams_count_text_alone(tmp_path: Path) -> None:
    train, valid = padded_pack(tmp_path / "train", COUNTS), padded_pack(tmp_path / "valid", COUNTS[::-1])
    vocabulary = tiny_tokenizer().vocab_size
    found = []
    for place in (train, valid):
        pack = open_pack(place)
        tokens, documents = (torch.from_numpy(x) for x in (pack.all_tokens(), pack.all_documents(apart=False)))
        text = documents >= 0 if place == train else scored_positions(tokens, documents)
        found.append(np.bincount(tokens[text].numpy(), minlength=vocabulary))
    seen = found[0] + 1.0
    seen[tiny_tokenizer().mask_id] = 0
    present = found[1] > 0
    expected = -(found[1][present] * np.log(seen[present] / seen.sum())).sum() / found[1].sum()
    assert unigram_perplexity(train, valid) == pytest.approx(math.exp(expected), rel=1e-12)


@pytest.mark.parametrize(("objective", "size"), OBJECTIVES)
def test_variances_leave_padding_out(tmp_path: Path, objective: str, size: int | None) -> None:
    """The same sequences with other tokens in their padding; AR's estimate is the mean over the drawn texts' tokens."""
    run = padded_run(tmp_path, objective, size)
    model = load_model(find_export(str(tiny_export(run))), CPU)
    pack = open_pack(run.data.train)
    tokens, documents = (torch.from_numpy(x) for x in (pack.all_tokens(), pack.all_documents(apart=False)))
    garbage = torch.where(documents < 0, 7, tokens)
    plan = BatchPlan(batches=3, sequences=4, at_once=2, gradient=True)
    one, other = (variances(model, run, Texts(x, documents), plan) for x in (tokens, garbage))
    for name in ("nelbo", "var_nelbo", "var_block", "var_gradient"):
        value = getattr(one, name)
        assert getattr(other, name) == (None if value is None else pytest.approx(value, rel=1e-4))
        assert value is None or math.isfinite(value)


def test_the_grid_search_leaves_padding_out(tmp_path: Path) -> None:
    run = padded_run(tmp_path, BD3, 4, objective__clip_search__method="grid", objective__clip_search__sequences=8)
    model = load_model(find_export(str(tiny_export(run))), CPU)
    engine: Any = OneProcess(model)
    stepper = Stepper(run, World(0, 1, 0, 1, CPU), engine, engine, mask_of(run), None)
    search = ClipSearch(stepper, open_pack(tmp_path / "valid"))
    first, _, scalars = search.search(TrainState())
    held_out = search._held_out
    assert held_out is not None and held_out.documents is not None
    held_out.tokens = torch.where(held_out.documents < 0, 7, held_out.tokens)
    second, _, others = search.search(TrainState())
    assert first.clip(4).interval == second.clip(4).interval
    assert others == pytest.approx(scalars, rel=1e-4)


def test_packs_without_padding_tell_nothing(tmp_path: Path) -> None:
    assert open_pack(tiny_pack(tmp_path / "plain")).all_documents(apart=False) is None


@pytest.mark.parametrize("method", ["none", "grid", "moments"])
def test_moments_are_taken_for_the_search_that_reads_them(tmp_path: Path, method: str) -> None:
    run = padded_run(tmp_path, BD3, 4, objective__clip_search__method=method)
    model = load_model(find_export(str(tiny_export(run))), CPU)
    result, _ = step(run, model, 4, list(range(8)))
    assert (result.moments is not None) == (method == "moments")
    if result.moments is not None:
        assert result.moments[0].sum() == sum(-(-count // 4) - (count == 1) for count in COUNTS)
    assert result.block_variance is not None and math.isfinite(result.block_variance)
