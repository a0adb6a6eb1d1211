"""The loss from hidden states, chunk by chunk, against whole logits; and views that share a clean pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.schema import BD3, MDLM, WeightConfig
from bd3_ds.diffusion import chunked_head
from bd3_ds.diffusion.chunked_head import HeadLoss
from bd3_ds.diffusion.noise import Noise, make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.diffusion.score_entropy import ScoreNats
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.model.dit import DiT, DiTConfig, as_denoiser
from tests.helpers.memory import LargestTensor
from tests.helpers.schedules import schedule_config

WIDTH = 3
MakeRead = Callable[[Tensor, Tensor, int, Tensor | None], HeadLoss]
READS: dict[str, MakeRead] = {
    "subs": lambda targets, _, mask_id, weight: SubsNats(targets, mask_id, weight),
    "score": lambda targets, sigma, mask_id, weight: ScoreNats(targets, mask_id, weight, sigma=sigma),
}


def scene(name: str, count: int, vocab: int, seed: int, weighted: bool = True) -> tuple[HeadLoss, list[Tensor]]:
    """What is asked of a head, and its hidden states, matrix and bias; [MASK] is the middle of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    mask_id = vocab // 2
    targets = torch.randint(0, vocab - 1, (count,), generator=generator)
    targets += targets >= mask_id
    sigma = torch.rand(count, generator=generator) * 6 + 0.01
    weight = torch.rand(count, generator=generator) * 2 if weighted else None
    head = [torch.randn(shape, generator=generator) for shape in ((count, WIDTH), (vocab, WIDTH), (vocab,))]
    return READS[name](targets, sigma, mask_id, weight), [x.requires_grad_() for x in head]


def results(answer: tuple[Tensor, Tensor], head: list[Tensor]) -> list[Tensor]:
    """Loss and nats, and the gradient of three times the loss."""
    loss, nats = answer
    assert loss.requires_grad and not nats.requires_grad
    return [loss.detach(), nats, *torch.autograd.grad(3 * loss, head)]


@pytest.mark.parametrize("name", READS)
@given(
    st.integers(1, 40),
    st.integers(2, 30),
    st.integers(1, 4000),
    st.integers(1, 1000),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=100)
def test_chunks_are_whole_logits(
    name: str, count: int, vocab: int, chunk_bytes: int, cached_bytes: int, seed: int
) -> None:
    read, head = scene(name, count, vocab, seed)
    hidden, matrix, bias = head
    expected = results(read.of_logits(hidden @ matrix.T + bias), head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_head, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(chunked_head, "CACHED_BYTES", cached_bytes)
        ours = results(read(*head), head)
        with torch.no_grad():
            frozen = read(*head)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(list(frozen), ours[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_without_a_weight_the_sum_is_plain(name: str, with_gradient: bool) -> None:
    read, head = scene(name, 7, 11, 0, weighted=False)
    with torch.set_grad_enabled(with_gradient):
        loss, nats = read(*head)
        expected = read.of_logits(head[0] @ head[1].T + head[2])
    assert loss == nats.sum() and not nats.requires_grad
    torch.testing.assert_close(nats, expected[1])
    torch.testing.assert_close(loss.detach(), expected[0].detach())


@pytest.mark.parametrize("name", READS)
def test_nothing_masked_costs_nothing(name: str) -> None:
    """A micro-batch may draw no masks at all: zeros, not nan, so that training goes on."""
    read, head = scene(name, 0, 11, 0)
    for each in results(read(*head), head):
        assert torch.equal(each, torch.zeros_like(each))
    assert read(*head)[1].shape == (0,)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_all_logits_are_never_there(name: str, with_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor is the matrix or a chunk, whatever the number of tokens."""
    count, vocab = 512, 64
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 16 * vocab * 4)
    monkeypatch.setattr(chunked_head, "CACHED_BYTES", 4 * vocab * 4)
    read, head = scene(name, count, vocab, 0)
    with LargestTensor() as seen, torch.set_grad_enabled(with_gradient):
        loss, _ = read(*head)
        if with_gradient:
            loss.backward()
    assert seen.numel <= max(count * WIDTH, 16 * vocab)
    with LargestTensor() as seen:
        read.of_logits(head[0] @ head[1].T + head[2])
    assert seen.numel >= count * vocab  # what is measured here would show


@pytest.mark.parametrize("name", READS)
def test_bf16_is_fp32_to_its_rounding(name: str) -> None:
    """Loss to 1%, gradients to 2% of their largest number: logits and slopes are rounded to 8 bits."""
    read, head = scene(name, 64, 33, 1)
    low = [x.detach().bfloat16().requires_grad_() for x in head]
    exact = [x.detach().float().requires_grad_() for x in low]
    ours, expected = results(read(*low), low), results(read(*exact), exact)
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [torch.bfloat16] * 3
    assert float(ours[0]) == pytest.approx(float(expected[0]), rel=0.01)
    for a, b in zip(ours[2:], expected[2:], strict=True):
        assert (a.float() - b).abs().max() < 0.02 * b.abs().max()


VOCAB, MASK, LENGTH, VIEWS, TEXTS = 13, 12, 16, 3, 2


def part(noise: Noise, view: int) -> Noise:
    """One view of each text."""
    rows = slice(view, None, VIEWS)
    tokens = None if noise.token_rate is None else noise.token_rate[rows]
    return Noise(noise.rate[rows], noise.bound_weight[rows], noise.loss_weight[rows], tokens, noise.draws[rows])


@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("backend", ["dense", "auto"])
@pytest.mark.parametrize(("name", "size"), [(BD3, 1), (BD3, 4), (BD3, 16), (MDLM, 16)])
def test_views_of_a_text_are_losses_of_their_own(name: str, size: int, backend: str, by_frequency: bool) -> None:
    """K views beside one clean pass have the mean loss and gradient of K passes, and each its own blocks' nats."""
    model = DiT(DiTConfig(VOCAB, 16, 3, 2, 2, 8, False, attention=backend))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x0 = torch.randint(0, MASK, (TEXTS, LENGTH), generator=generator)
    slots, rows = np.arange(TEXTS * VIEWS), TEXTS * VIEWS
    u, draws = stratified_times(1, 0, slots, rows, LENGTH // size), mask_draws(1, 0, slots, LENGTH)
    masking_score = torch.rand(rows, LENGTH, generator=generator, dtype=torch.float64) if by_frequency else None
    noise = make_noise(u, draws, make_proposal(schedule_config()), WeightConfig("elbo", 0.0), masking_score)

    def run(given_noise: Noise):
        loss = training_loss(name, as_denoiser(model, size), x0, given_noise, MASK)
        gradient = torch.autograd.grad(loss.loss, list(model.parameters()), allow_unused=True)
        return loss, [g for g in gradient if g is not None]

    together, gradient = run(noise)
    losses, gradients = zip(*(run(part(noise, view)) for view in range(VIEWS)), strict=True)
    torch.testing.assert_close(together.loss, torch.stack([each.loss for each in losses]).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(together.nelbo, torch.stack([each.nelbo for each in losses]).mean(), rtol=1e-5, atol=0)
    by_view = torch.stack([each.block_nats for each in losses], dim=1).flatten(0, 1)
    torch.testing.assert_close(together.block_nats, by_view, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(together.bin_masked, sum(each.bin_masked for each in losses))
    torch.testing.assert_close(together.bin_nats, sum(each.bin_nats for each in losses), rtol=1e-5, atol=1e-5)
    expected = [torch.stack(each).mean(0) for each in zip(*gradients, strict=True)]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
