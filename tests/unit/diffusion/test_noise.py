"""Noise by place, the weight that keeps the bound unbiased, and the objectives on denoisers whose answer is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.registries import SCHEDULES
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, WeightConfig
from bd3_ds.diffusion import noise as noise_module
from bd3_ds.diffusion.chunked_head import HeadLoss
from bd3_ds.diffusion.clip_search import Spread, binned, spread_sums
from bd3_ds.diffusion.noise import Noise, choose_block_size, corrupt, make_noise, mask_draws, stratified_times
from bd3_ds.diffusion.objective import Loss, training_loss
from bd3_ds.diffusion.proposal import make_proposal
from bd3_ds.runtime.rng import Purpose, generator
from tests.helpers.schedules import schedule_config

VOCAB, MASK, LENGTH = 11, 10, 16
OBJECTIVES = [(AR, 1), (MDLM, 16), (SEDD, 16), (BD3, 1), (BD3, 2), (BD3, 4), (BD3, 16)]

seeds = st.integers(0, 2**32 - 1)
steps = st.integers(0, 10**7)


@given(seeds, steps, st.integers(1, 24), st.integers(1, 24))
@settings(deadline=None)
def test_every_stratum_is_hit_once(seed: int, step: int, batch: int, blocks: int) -> None:
    """So the mean rate of a global batch is 1/2 to half a stratum, whatever the draw."""
    u = stratified_times(seed, step, np.arange(batch), batch, blocks)
    total = batch * blocks
    assert u.shape == (batch, blocks) and u.min() >= 0 and u.max() < 1
    assert sorted((u.flatten() * total).floor().int().tolist()) == list(range(total))
    assert abs(float(u.mean()) - 0.5) <= 0.5 / total + 1e-12


@given(seeds, steps, st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=4))
@settings(deadline=None)
def test_how_a_batch_is_dealt_out_does_not_matter(seed: int, step: int, order: list[int], cuts: list[int]) -> None:
    """Ranks and micro-batches are any parts of the slots, in any order."""
    whole_u = stratified_times(seed, step, np.arange(12), 12, 4)
    whole_draws = mask_draws(seed, step, np.arange(12), LENGTH)
    edges = [0, *sorted(cuts), 12]
    for begin, end in itertools.pairwise(edges):
        slots = np.array(order[begin:end], dtype=np.int64)
        if len(slots):
            assert torch.equal(stratified_times(seed, step, slots, 12, 4), whole_u[slots])
            assert torch.equal(mask_draws(seed, step, slots, LENGTH), whole_draws[slots])


def test_places_have_noise_of_their_own() -> None:
    """Another seed or step changes everything; two sequences of a step share no mask."""
    slots = np.arange(4)
    draws = [mask_draws(seed, step, slots, 64) for seed, step in ((1, 1), (1, 2), (2, 1))]
    times = [stratified_times(seed, step, slots, 4, 8) for seed, step in ((1, 1), (1, 2), (2, 1))]
    for one in (draws, times):
        rows = torch.cat(one)
        assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_blocks_see_every_rate_in_the_long_run() -> None:
    """No place of the batch is tied to a part of [0, 1]: over steps, each block's rates have the uniform's moments."""
    u = torch.stack([stratified_times(5, step, np.arange(2), 2, 4) for step in range(2000)]).flatten(1)  # [2000, 8]
    assert (u.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 2000)
    assert (u.var(0) - 1 / 12).abs().max() < 0.01
    assert u.min() < 0.01 and u.max() > 0.99


@given(seeds, st.integers(1, 6), st.integers(2, 40), st.floats(0, 1))
@settings(deadline=None)
def test_corrupt(seed: int, batch: int, length: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, MASK, (batch, length), generator=generator)
    draws = torch.rand(batch, length, generator=generator, dtype=torch.float64)
    x_t, masked = corrupt(x0, torch.full((batch, length), rate, dtype=torch.float64), draws, MASK)
    assert not masked[:, 0].any()
    assert torch.equal(x_t == MASK, masked)
    assert torch.equal(x_t[~masked], x0[~masked])
    assert torch.equal(masked[:, 1:], draws[:, 1:] < rate)


def test_masking_rate() -> None:
    """The share of masked tokens follows the rate that was drawn, and is t's mean over the batch."""
    p = make_proposal(schedule_config(t_min=0.2, t_max=0.6)).rate(stratified_times(1, 3, np.arange(256), 256, 4))
    x0 = torch.zeros(256, 256, dtype=torch.long)
    _, masked = corrupt(x0, p.repeat_interleave(64, 1), mask_draws(1, 3, np.arange(256), 256), MASK)
    by_block = masked.view(256, 4, 64).float().mean(-1)
    assert float(by_block[:, 1:].mean()) == pytest.approx(0.4, abs=0.01)
    assert ((by_block - p)[:, 1:].abs() < 5 * 0.5 / 8).all()


class Fixed:
    """A denoiser whose logits are a table of (token seen, position), or are made from the truth."""

    def __init__(self, truth: Tensor | None = None, seed: int | None = None, odds: float = 0.0):
        self.truth = truth
        self.odds = odds
        shape = (VOCAB, LENGTH, VOCAB)
        self.table = torch.zeros(shape)
        if seed is not None:
            self.table = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def __call__(
        self, x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor, read: HeadLoss
    ) -> tuple[Tensor, Tensor]:
        return read.of_logits(self.logits(x_t, at))

    def logits(self, x_t: Tensor, at: Tensor) -> Tensor:
        """[N, V] at the places `at` of the flattened x_t."""
        if self.truth is not None:
            return torch.where(torch.nn.functional.one_hot(self.truth.flatten()[at], VOCAB) == 1, self.odds, -1e4)
        return self.table[x_t.flatten()[at], at % LENGTH]


def text(batch: int) -> Tensor:
    return torch.randint(0, MASK, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def noise(batch: int, size: int, part: slice = slice(None), weight: str = "elbo", **schedule: Any) -> Noise:
    slots = np.arange(batch)[part]
    u = stratified_times(7, 0, slots, batch, LENGTH // size)
    proposal = make_proposal(schedule_config(**schedule))
    return make_noise(u, mask_draws(7, 0, slots, LENGTH), proposal, WeightConfig(weight, 0.0))


def loss_of(name: str, denoiser: Fixed, x0: Tensor, given_noise: Noise) -> Loss:
    return training_loss(name, denoiser, x0, None if name == AR else given_noise, MASK)


@pytest.mark.parametrize(("name", "size"), OBJECTIVES)
def test_uniform_denoiser_costs_log_v(name: str, size: int) -> None:
    """In expectation, a token nobody knows anything about costs log(V - 1)."""
    batch = 8192
    loss = loss_of(name, Fixed(), text(batch), noise(batch, size))
    assert float(loss.loss) == pytest.approx(math.log(VOCAB - 1), rel=1e-6 if name == AR else 0.03)
    mean = loss.bin_nats.sum() / loss.bin_masked.sum()
    if name != SEDD:  # whose nats are the entropy's, of another scale
        assert float(mean) == pytest.approx(math.log(VOCAB - 1), rel=1e-6)


@pytest.mark.parametrize(("name", "size"), OBJECTIVES)
def test_perfect_denoiser_costs_nothing(name: str, size: int) -> None:
    x0 = text(8)
    truth = x0.roll(-1, 1) if name == AR else x0
    loss = loss_of(name, Fixed(truth, odds=math.log(VOCAB - 1) if name == SEDD else 1e4), x0, noise(8, size))
    assert float(loss.loss) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("name", "size"), OBJECTIVES)
def test_a_micro_batch_is_the_mean_of_its_halves(name: str, size: int) -> None:
    x0, denoiser = text(8), Fixed(seed=1)
    whole = loss_of(name, denoiser, x0, noise(8, size))
    halves = [loss_of(name, denoiser, x0[part], noise(8, size, part)) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(whole.loss, (halves[0].loss + halves[1].loss) / 2)
    torch.testing.assert_close(whole.bin_nats, halves[0].bin_nats + halves[1].bin_nats)
    assert torch.equal(whole.bin_masked, halves[0].bin_masked + halves[1].bin_masked)


def test_losses_land_in_the_bin_of_their_rate() -> None:
    loss = loss_of(BD3, Fixed(), text(64), noise(64, 4, t_min=0.31, t_max=0.39))
    assert loss.bin_masked[3] > 0 and loss.bin_masked.sum() == loss.bin_masked[3]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [1, 4, 16])
def test_every_schedule_estimates_the_same_bound(schedule: str, size: int) -> None:
    """A token nobody knows anything about costs log(V - 1) under any proposal, also a clipped or defended one."""
    batch = 4096
    wide = {"gaussian": {"mu": 0.5, "sigma": 0.3}, "bimodal": {"sigma1": 0.3, "sigma2": 0.3}}
    for more in ({}, {"t_min": 0.3, "t_max": 0.8}, {"t_min": 0.3, "t_max": 0.8, "defensive": 0.2}):
        given_noise = noise(batch, size, name=schedule, **wide, **more)
        loss = loss_of(BD3, Fixed(), text(batch), given_noise)
        spread = Spread.of(spread_sums(loss.block_nats, given_noise.bound_weight))
        error = 5 * math.sqrt(spread.variance / spread.count)
        assert abs(float(loss.nelbo) - math.log(VOCAB - 1)) < error
        assert error < 0.35 * math.log(VOCAB - 1)


def test_loss_and_bound_part_where_a_weight_is_in_force() -> None:
    """`nelbo` is what it is without the weight; the loss of `simple` is plain cross-entropy on masked tokens."""
    x0, denoiser = text(256), Fixed(seed=3)
    plain = loss_of(BD3, denoiser, x0, noise(256, 4))
    assert float(plain.loss) == pytest.approx(float(plain.nelbo), rel=1e-6)
    simple = loss_of(BD3, denoiser, x0, noise(256, 4, weight="simple"))
    assert float(simple.nelbo) == pytest.approx(float(plain.nelbo), rel=1e-12)
    assert float(simple.loss) == pytest.approx(float(simple.bin_nats.sum()) / (256 * (LENGTH - 1)), rel=1e-5)
    sigmoid = loss_of(BD3, denoiser, x0, noise(256, 4, weight="sigmoid"))
    assert float(sigmoid.loss) == pytest.approx(float(simple.loss), rel=1e-5)  # p * 1/p


def test_block_nats_are_the_masked_losses_over_maskable_tokens() -> None:
    """From first principles: what a block's masked tokens cost, over those that could have been masked."""
    x0, denoiser, given_noise = text(8), Fixed(seed=4), noise(8, 4)
    loss = loss_of(BD3, denoiser, x0, given_noise)
    rate = given_noise.rate.repeat_interleave(4, 1)
    x_t, masked = corrupt(x0, rate, given_noise.draws, MASK)
    logits = denoiser.logits(x_t, torch.arange(x_t.numel())).view(8, LENGTH, VOCAB)
    logits[..., MASK] = -torch.inf
    nats = -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0].double() * masked
    expected = nats.view(8, 4, 4).sum(-1) / torch.tensor([3.0, 4.0, 4.0, 4.0])
    torch.testing.assert_close(loss.block_nats, expected, rtol=1e-5, atol=1e-6)
    estimate = (loss.block_nats * torch.tensor([3.0, 4.0, 4.0, 4.0]) / given_noise.rate).sum() / (8 * (LENGTH - 1))
    assert float(loss.nelbo) == pytest.approx(float(estimate), rel=1e-5)


@given(seeds, st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_sums_for_the_clip_search_add_up(seed: int, batch: int, blocks: int) -> None:
    """Over micro-batches, and to numpy's mean and variance; nan blocks do not count."""
    generator = torch.Generator().manual_seed(seed)
    nats = torch.rand(2 * batch, blocks, generator=generator, dtype=torch.float64)
    rate = torch.rand(2 * batch, blocks, generator=generator, dtype=torch.float64).clamp(min=1e-3)
    nats[0, 0] = torch.nan
    whole, parts = spread_sums(nats, 1 / rate), spread_sums(nats[:batch], 1 / rate[:batch])
    torch.testing.assert_close(whole, parts + spread_sums(nats[batch:], 1 / rate[batch:]))
    values = (nats / rate)[~nats.isnan()].numpy()
    assert Spread.of(whole).mean == pytest.approx(values.mean())
    if len(values) > 1:
        assert Spread.of(whole).variance == pytest.approx(values.var(ddof=1), rel=1e-6, abs=1e-9)
    by_place = binned(nats, 1 / rate, rate, 5)
    torch.testing.assert_close(by_place.sum(1), whole)
    halves = [binned(nats[part], 1 / rate[part], rate[part], 5) for part in (slice(0, batch), slice(batch, None))]
    torch.testing.assert_close(by_place, halves[0] + halves[1])


def test_block_sizes_of_a_mixed_stage_come_up_equally_often() -> None:
    drawn = [choose_block_size(3, step, (4, 16, 64)) for step in range(3000)]
    counts = np.array([drawn.count(size) for size in (4, 16, 64)])
    assert ((counts - 1000) ** 2 / 1000).sum() < 13.8  # chi-square, 2 degrees of freedom, 0.1%
    assert drawn == [choose_block_size(3, step, (4, 16, 64)) for step in range(3000)]
    assert choose_block_size(3, 7, (16,)) == 16


def test_micro_batches_of_a_step_share_one_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole batch's permutation is drawn once a step; each micro-batch has its rows of it."""
    drawn: list[tuple[int, ...]] = []

    def counted(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
        drawn.append((int(purpose), *place))
        return generator(seed, purpose, *place)

    monkeypatch.setattr(noise_module, "generator", counted)
    for step in (31, 32):
        parts = [stratified_times(77, step, slots, 12, 4) for slots in np.arange(12).reshape(4, 3)]
        order = generator(77, Purpose.RATE_STRATA, step).permutation(48).reshape(12, 4)
        jitter = generator(77, Purpose.RATE_JITTER, step).random(48).reshape(12, 4)
        assert np.array_equal(torch.cat(parts).numpy(), (order + jitter) / 48)
    assert drawn == [
        (int(purpose), step) for step in (31, 32) for purpose in (Purpose.RATE_STRATA, Purpose.RATE_JITTER)
    ]
