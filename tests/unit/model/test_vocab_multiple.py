"""Rows beyond the vocabulary: friendlier sizes, the same values, no probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_ds.checkpoint.export import find_export
from bd3_ds.config.load import load_resolved, to_yaml
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, WeightConfig
from bd3_ds.diffusion import chunked_head
from bd3_ds.diffusion.likelihood import Estimator, Texts
from bd3_ds.diffusion.noise import make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import Loss, training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.diffusion.score_entropy import ScoreNats
from bd3_ds.evaluation.network import load_model
from bd3_ds.evaluation.perplexity import bound_of
from bd3_ds.model.build import dit_config, initialise
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from bd3_ds.model.flops import training_flops_per_sequence
from bd3_ds.planning.memory import parameter_count
from bd3_ds.runtime.errors import UserError
from bd3_ds.sampling.options import WindowPlan
from bd3_ds.sampling.sampler import denoiser_of, sample
from bd3_ds.train.preflight import preflight
from tests.helpers.schedules import schedule_config
from tests.helpers.tiny import LENGTH, tiny_export, tiny_run

VOCAB, MASK, CPU = 13, 5, torch.device("cpu")
OBJECTIVES = [(AR, 1), (MDLM, LENGTH), (SEDD, LENGTH), (BD3, 1), (BD3, 4)]


def networks(objective: str, multiple: int = 8) -> tuple[DiT, DiT]:
    """One network with and one without further rows, which hold huge numbers."""
    plain, wide = (
        DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, objective == AR, vocab_multiple=m)).eval() for m in (1, multiple)
    )
    generator = torch.Generator().manual_seed(0)
    given = dict(wide.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            given[name].fill_(1e4)[tuple(slice(0, n) for n in parameter.shape)] = parameter
    return plain, wide


def texts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, VOCAB - 1, (3, LENGTH), generator=generator)
    x0 += x0 >= MASK
    return torch.where(torch.rand(x0.shape, generator=generator) < 0.5, MASK, x0), x0


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(13, 1, 13), (13, 8, 16), (16, 8, 16), (50258, 64, 50304)])
def test_rows(vocab: int, multiple: int, rows: int) -> None:
    network = DiTConfig(vocab, 2, 1, 1, 1, 2, False, vocab_multiple=multiple)
    assert network.vocab_rows == rows
    model = DiT(network)
    assert model.embed.weight.shape == model.head.linear.weight.shape == (rows, 2)


@torch.no_grad()
@pytest.mark.parametrize(("objective", "size"), OBJECTIVES)
def test_logits_are_those_of_the_vocabulary(objective: str, size: int) -> None:
    (x_t, x0), sigma = texts(), torch.tensor([0.1, 1.0, 3.0])
    given = (x0, None) if objective == AR else (x_t, x0 if objective == BD3 else None)
    plain, wide = (
        model(*given, block_size=size, sigma=sigma if objective == SEDD else None) for model in networks(objective)
    )
    assert wide.shape == (3, LENGTH, VOCAB)
    torch.testing.assert_close(wide, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [chunked_head.CHUNK_BYTES, 200])
@pytest.mark.parametrize(("objective", "size"), OBJECTIVES)
def test_losses_and_gradients(objective: str, size: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", chunk_bytes)
    _, x0 = texts()
    u, draws = stratified_times(1, 0, np.arange(3), 3, LENGTH // size), mask_draws(1, 0, np.arange(3), LENGTH)
    noise = make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0))

    def run(model: DiT) -> tuple[Loss, dict[str, Tensor]]:
        loss = training_loss(objective, as_denoiser(model, size), x0, None if objective == AR else noise, MASK)
        loss.loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (plain, expected), (wide, found) = (run(model) for model in networks(objective))
    torch.testing.assert_close(wide.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(wide.nelbo, plain.nelbo, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        ours = found[name]
        part = tuple(slice(0, n) for n in gradient.shape)
        torch.testing.assert_close(ours[part], gradient, rtol=1e-4, atol=1e-6)
        assert ours.count_nonzero() == ours[part].count_nonzero()


def test_bf16_in_chunks() -> None:
    """Both dtypes take the same columns: a row of slopes is zero beyond the vocabulary."""
    read = ScoreNats(torch.tensor([0, 2, 3]), 1, torch.ones(3), sigma=torch.full((3,), 0.5))
    generator = torch.Generator().manual_seed(0)
    hidden, matrix, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 4), (8, 4), (5,)))
    leaves = [x.requires_grad_() for x in (hidden, matrix, bias)]
    loss, _ = read(*leaves)
    d_hidden, d_matrix, d_bias = torch.autograd.grad(loss, leaves)
    again = [hidden.detach().requires_grad_(), matrix[:5].detach().requires_grad_(), bias.detach().requires_grad_()]
    same, _ = read(*again)
    expected = torch.autograd.grad(same, again)
    assert loss == same and d_matrix[5:].abs().sum() == 0
    torch.testing.assert_close((d_hidden, d_matrix[:5], d_bias), expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("objective", "size"), OBJECTIVES)
def test_bounds_of_an_export(tmp_path: Path, objective: str, size: int) -> None:
    """Of the same weights, with and without further rows; the export comes back as it was written."""
    block = size if objective == BD3 else None
    more: dict[str, Any] = {"eval__estimator": "mc" if objective == SEDD else "stratified"}
    run = tiny_run(tmp_path, objective__name=objective, objective__block_size=block, model__vocab_multiple=64, **more)
    export = find_export(str(tiny_export(run)))
    wide = load_model(export, CPU)
    assert wide.network.vocab_rows == 128 and wide.network.vocab_size == 81
    narrow = DiT(dit_config(tiny_run(tmp_path, objective__name=objective, **more).model, objective)).eval()
    weights = {
        name: tensor[:81] if len(tensor) == 128 and ("embed" in name or "head.linear" in name) else tensor
        for name, tensor in wide.state_dict().items()
    }
    narrow.load_state_dict(weights)
    x0 = torch.randint(0, 80, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    estimator = {AR: "exact", SEDD: "mc", MDLM: "stratified", BD3: "exact"}[objective]
    bounds = [bound_of(model, run, Texts(x0), Estimator(estimator, views=3, seed=1)) for model in (wide, narrow)]
    torch.testing.assert_close(bounds[0].nelbo, bounds[1].nelbo, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("objective", "size"), OBJECTIVES)
def test_samples_are_tokens(objective: str, size: int) -> None:
    plain, wide = networks(objective)
    plan = WindowPlan(LENGTH, size, LENGTH, LENGTH // 2, whole=size == LENGTH)
    drawn = [
        sample(denoiser_of(model, size), plan, torch.tensor([[0]]), num=4, mask_id=MASK, timed=objective == SEDD).tokens
        for model in (plain, wide)
    ]
    assert drawn[1].max() < VOCAB and torch.equal(*drawn)


def test_a_fresh_network_is_the_same(tmp_path: Path) -> None:
    """The vocabulary's rows get the numbers that they get alone."""
    plain, wide = networks(BD3)
    for model in (plain, wide):
        initialise(model, 3)
    for name, parameter in plain.named_parameters():
        part = tuple(slice(0, n) for n in parameter.shape)
        assert torch.equal(wide.get_parameter(name)[part], parameter)


def test_costs_follow(tmp_path: Path) -> None:
    plain, wide = (DiTConfig(VOCAB, 16, 2, 2, 2, 8, False, vocab_multiple=m) for m in (1, 8))
    costs = [training_flops_per_sequence(network, BD3, LENGTH, 4, 0.5) for network in (plain, wide)]
    assert costs[1] - costs[0] == pytest.approx(3 * 0.5 * (LENGTH - 1) * 2 * 16 * (16 - VOCAB))
    run, _ = preflight(tiny_run(tmp_path), 1)
    wider, _ = preflight(tiny_run(tmp_path, model__vocab_multiple=64), 1)
    counts = [parameter_count(dit_config(r.model, BD3)) for r in (run, wider)]
    assert counts[1] - counts[0] == (128 - 81) * (32 + 32 + 1)


@pytest.mark.parametrize("value", ["0", "-64"])
def test_an_impossible_multiple_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=f"model.vocab_multiple={value}"):
        preflight(tiny_run(tmp_path, model__vocab_multiple=value), 1)


def test_older_runs_have_no_further_rows(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    lines = [line for line in to_yaml(run).splitlines() if "vocab_multiple" not in line]
    (tmp_path / "old.yaml").write_text("\n".join(lines))
    assert load_resolved(tmp_path / "old.yaml").model.vocab_multiple == 1
