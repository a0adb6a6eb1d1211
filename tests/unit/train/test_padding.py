"""Padding is nobody's: with it, losses and bounds are those of the text alone, whatever stands there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, WeightConfig
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.bounds import bound_under
from bd3_ds.diffusion.clip_search import spread_sums
from bd3_ds.diffusion.likelihood import Bound, Estimator, Texts
from bd3_ds.diffusion.noise import make_noise, mask_draws, next_token_targets, scored_positions, stratified_times
from bd3_ds.diffusion.objective import Loss, training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.evaluation.denoisers import scored_network
from bd3_ds.model.attention.masks import pass_mask
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from tests.helpers.attention import assert_backends_agree
from tests.helpers.schedules import schedule_config

VOCAB, MASK, LENGTH, CPU = 11, 10, 16, torch.device("cpu")
BACKENDS = ["dense", "sdpa", "stripes", "auto"]
# Objective and block size; what is left of a text: whole blocks, a part of one, the given token alone.
SIZES = [(AR, 1), (MDLM, LENGTH), (SEDD, LENGTH), (BD3, 1), (BD3, 2), (BD3, 4), (BD3, 8), (BD3, LENGTH)]
TEXTS = [16, 12, 8, 11, 5, 2, 1]
# Padding before documents that start on a block of 4, and at the end.
GAPS = torch.tensor(
    [
        [0] * 6 + [-1] * 2 + [1] * 3 + [-1] + [2] * 4,
        [0] + [-1] * 3 + [1] * 4 + [-1] * 8,
        [0] * 9 + [-1] * 3 + [1] + [-1] * 3,
    ]
)


def network(objective: str, backend: str = "dense") -> DiT:
    """Random weights everywhere, so that nothing cancels."""
    model = DiT(DiTConfig(VOCAB, 16, 2, 2, 2, 8, objective == AR, attention=backend)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def texts(rows: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(0, MASK, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def padded(count: int) -> Tensor:
    """Documents [1, L] of one text of `count` tokens."""
    return torch.where(torch.arange(LENGTH) < count, 0, -1)[None]


def garbage(x0: Tensor, documents: Tensor) -> Tensor:
    """Other tokens where there is padding, [MASK] among them."""
    return torch.where(documents < 0, (x0 + 7) % VOCAB, x0)


def bound(
    objective: str, model: DiT, x0: Tensor, size: int, estimator: str, documents: Tensor | None, views: int = 1
) -> Bound:
    how = Estimator(estimator, views, seed=3, at_once=5)
    return bound_under(objective, scored_network(model, size, documents), Texts(x0, documents), size, MASK, how)


def by_definition(model: DiT, x0: Tensor, size: int) -> float:
    """The bound of one text [1, n] alone: sums over blocks and all subsets; the last block may be a shorter one."""
    total, count = 0.0, x0.shape[1]
    for begin in range(0, count, size):
        places = [i for i in range(begin, min(begin + size, count)) if i > 0]
        for m in range(1, len(places) + 1):
            for chosen in itertools.combinations(places, m):
                x_t = x0.clone()
                x_t[:, list(chosen)] = MASK
                logits = model(x_t, x0, block_size=size)
                logits[..., MASK] = -torch.inf
                nats = -logits.log_softmax(-1).gather(-1, x0[..., None])[0, list(chosen), 0]
                total += float(nats.double().sum()) / m / math.comb(len(places), m)
    return total


@torch.no_grad()
@pytest.mark.parametrize("count", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_exact_is_brute_force_on_the_text(size: int, count: int) -> None:
    model, x0 = network(BD3), texts()
    found = bound(BD3, model, x0, size, "exact", padded(count))
    assert found.total == pytest.approx(by_definition(model, x0[:, :count], size), rel=1e-5, abs=1e-5)
    assert found.tokens == count - 1 and found.nelbo[:, count:].abs().sum() == 0


@torch.no_grad()
@pytest.mark.parametrize("count", [12, 8, 5, 2])
@pytest.mark.parametrize(
    ("objective", "estimator"),
    [(AR, "exact"), (MDLM, "stratified"), (MDLM, "mc"), (SEDD, "mc"), (BD3, "exact")],
)
def test_a_padded_text_has_the_bound_of_the_shorter_one(objective: str, estimator: str, count: int) -> None:
    """Sampled with one view of one block, for which both draw the same numbers."""
    model, x0 = network(objective), texts()
    whole, part = (1, 1) if objective in (AR, BD3) else (LENGTH, count)
    long = bound(objective, model, x0, whole, estimator, padded(count))
    short = bound(objective, model, x0[:, :count], part, estimator, None)
    torch.testing.assert_close(long.nelbo[:, :count], short.nelbo, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long.variance, short.variance, rtol=1e-4, atol=1e-5)
    assert long.tokens == short.tokens == count - 1 and long.nelbo[:, count:].abs().sum() == 0


@torch.no_grad()
def test_a_text_with_gaps_is_read_on_from_its_last_token() -> None:
    """AR: documents see themselves alone, so that a row is the same without its gaps."""
    model, x0 = network(AR), texts(3)
    found = bound(AR, model, x0, 1, "exact", GAPS)
    for row in range(3):
        text = GAPS[row] >= 0
        without = bound(AR, model, x0[row : row + 1, text], 1, "exact", GAPS[row : row + 1, text])
        torch.testing.assert_close(found.nelbo[row, text], without.nelbo[0], rtol=1e-5, atol=1e-5)
    assert found.tokens == int((GAPS >= 0).sum()) - 3


def test_next_token_targets_skip_padding() -> None:
    at, of = next_token_targets(texts(2)[:, :4], torch.tensor([[0, -1, 0, 0], [0, 0, -1, -1]]))
    assert at.tolist() == [0, 2, 4] and of.tolist() == [2, 3, 5]


@torch.no_grad()
@pytest.mark.parametrize("documents", [GAPS, GAPS.clamp(max=0)], ids=["apart", "together"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_sampled_bounds_agree_with_exact(size: int, documents: Tensor) -> None:
    model, x0 = network(BD3, "stripes"), texts(3)
    truth = bound(BD3, model, x0, size, "exact", documents).nelbo.sum(1)
    for estimator in ("stratified", "mc"):
        found = bound(BD3, model, x0, size, estimator, documents, views=300)
        error = found.stderr + 1e-6
        assert bool(((found.nelbo.sum(1) - truth).abs() < 4.5 * error + 2e-3 * truth).all())  # mc: no rates below 1e-3
        assert found.tokens == int(scored_positions(x0, documents).sum())


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_who_knows_nothing_pays_ln_v_for_each_token(size: int) -> None:
    def uniform(x0: Tensor) -> Any:
        return lambda x_t, at, read: read.of_logits(torch.zeros(len(at), VOCAB))

    values = [likelihood.stratified(uniform, Texts(texts(3), GAPS), size, MASK, views=3, seed=0)]
    if size <= 8:
        values.append(likelihood.exact(uniform, Texts(texts(3), GAPS), size, MASK))
    for value in values:
        assert value.total / value.tokens == pytest.approx(math.log(VOCAB - 1), rel=1e-6)
        by_row = ((GAPS >= 0).sum(1) - 1).double() * math.log(VOCAB - 1)
        torch.testing.assert_close(value.nelbo.sum(1), by_row, rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("objective", "size"), SIZES)
def test_what_padding_holds_changes_no_bound(objective: str, size: int) -> None:
    model, x0 = network(objective), texts(3)
    estimators = ["exact"] if objective == AR else ["mc"] if objective == SEDD else ["stratified", "mc"]
    for estimator in estimators + (["exact"] if objective == BD3 and size <= 4 else []):
        one, other = (bound(objective, model, x, size, estimator, GAPS, 3) for x in (x0, garbage(x0, GAPS)))
        torch.testing.assert_close(one.nelbo, other.nelbo, rtol=1e-6, atol=1e-6)
        assert bool(one.nelbo.isfinite().all())


def loss_of(
    objective: str,
    model: DiT,
    x0: Tensor,
    size: int,
    documents: Tensor | None,
    views: int,
    score: Tensor | None,
) -> tuple[Loss, list[Tensor]]:
    """A step's loss, divided by the text's own tokens, and its gradient; noise of each place is the same always."""
    count, rows = x0.shape[1], len(x0) * views
    noise = None
    if objective != AR:
        u = stratified_times(5, 0, np.arange(rows), rows, LENGTH // size if count > size else 1)[:, : -(-count // size)]
        draws = mask_draws(5, 0, np.arange(rows), LENGTH)[:, :count]
        scores = None if score is None else score[:, :count].repeat_interleave(views, dim=0)
        beyond = None if documents is None else documents.repeat_interleave(views, dim=0)
        noise = make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0), scores, beyond)
    seen = float(scored_positions(x0, documents).sum()) / len(x0)
    loss = training_loss(
        objective, as_denoiser(model, size, documents), x0, noise, MASK, documents=documents, scored_tokens=seen
    )
    return loss, list(torch.autograd.grad(loss.loss, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize(
    ("objective", "size", "count", "views"),
    [
        (AR, 1, 11, 1),
        (MDLM, LENGTH, 11, 1),
        (SEDD, LENGTH, 11, 1),
        (BD3, LENGTH, 11, 2),
        (BD3, 4, 12, 1),
        (BD3, 4, 8, 2),
        (BD3, 1, 5, 2),
    ],
)
def test_a_padded_text_has_the_loss_of_the_shorter_one(
    objective: str, size: int, count: int, views: int, by_frequency: bool
) -> None:
    """Loss, estimate, blocks' nats and gradient; a single block is as long as its text."""
    model, x0 = network(objective), texts(2)
    score = torch.rand(x0.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    score = score if by_frequency else None
    documents = padded(count).expand(2, -1)
    # One rate a text for a single block; else the rates of the blocks that both have.
    long, gradient = loss_of(objective, model, x0, size, documents, views, score)
    short, expected = loss_of(objective, model, x0[:, :count], min(size, count), None, views, score)
    close(gradient, expected)
    for name in ("loss", "nelbo", "bin_nats", "bin_masked"):
        torch.testing.assert_close(getattr(long, name), getattr(short, name), rtol=1e-5, atol=1e-6)
    if short.block_nats is not None and long.block_nats is not None:
        blocks = short.block_nats.shape[1]
        torch.testing.assert_close(long.block_nats[:, :blocks], short.block_nats, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert bool(long.block_nats[:, blocks:].isnan().all())
        sums = [spread_sums(nats, torch.ones_like(nats)) for nats in (long.block_nats, short.block_nats)]
        torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-6)  # what the clip search sees


def close(gradient: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(gradient, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert bool(one.isfinite().all())
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("objective", "size"), SIZES)
def test_what_padding_holds_changes_no_gradient(objective: str, size: int, backend: str) -> None:
    model, x0 = network(objective, backend), texts(3)
    views = 2 if objective == BD3 else 1
    for documents in (GAPS, GAPS.clamp(max=0), torch.cat([padded(16), padded(3), padded(1)])):
        results = [
            loss_of(objective, model, x, size, documents, views, score)
            for x, score in (
                (x0, torch.full(x0.shape, 0.5)),
                (garbage(x0, documents), 0.5 + 0.4 * (documents < 0)),
            )
        ]
        (one, gradient), (other, changed) = results
        assert float(one.loss.detach()) > 0
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=0)
        close(gradient, changed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("objective", "size"), SIZES)
@torch.no_grad()
def test_text_does_not_see_padding(objective: str, size: int, backend: str) -> None:
    """Logits of text, exactly; and nothing is nan, padding's own logits included."""
    model, x0 = network(objective, backend), texts(3)
    x_t = torch.where(torch.rand(x0.shape, generator=torch.Generator().manual_seed(3)) < 0.5, MASK, x0)
    for documents in (GAPS, GAPS.clamp(max=0)):
        pair = []
        for noisy, clean in ((x_t, x0), (garbage(x_t, documents), garbage(x0, documents))):
            given = (clean, None) if objective == AR else (noisy, clean if objective == BD3 else None)
            pair.append(model(*given, block_size=size, documents=documents))
        assert bool(torch.stack(pair).isfinite().all())
        torch.testing.assert_close(pair[0][documents >= 0], pair[1][documents >= 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("noisy", "clean", "size"), [(16, 16, 4), (16, 16, 1), (0, 16, 1), (16, 0, 16), (16, 16, 8)])
def test_backends_agree_on_padding(noisy: int, clean: int, size: int) -> None:
    mask = pass_mask(noisy, clean, 0, 0, size, False, CPU).restrict_to_documents(GAPS)
    assert_backends_agree(mask, batch=3)
    assert bool(mask.dense.any(-1).all())  # no softmax over nothing
    b, i = torch.arange(3)[:, None, None], torch.arange(len(mask.queries))[:, None]
    flex: Any = mask.flex
    assert torch.equal(flex.mask_mod(b, torch.tensor(0), i, torch.arange(len(mask.keys))), mask.dense[:, 0])
