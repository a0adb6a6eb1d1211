"""Noise by place, the weight that keeps the bound unbiased, and the objectives on denoisers whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.check import SCHEDULES
from bd3_ds.config.schema import AR, BD3, MDLM, SEDD, ScheduleConfig
from bd3_ds.diffusion.noise import corrupt, mask_draws, stratified_times
from bd3_ds.diffusion.objective import Loss, Noise, training_loss
from bd3_ds.diffusion.schedule import Schedule, make_schedule

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
    schedule = make_schedule(ScheduleConfig("log_linear", 0.2, 0.6))
    t = schedule.place(stratified_times(1, 3, np.arange(256), 256, 4))
    x0 = torch.zeros(256, 256, dtype=torch.long)
    _, masked = corrupt(x0, schedule.rate(t).repeat_interleave(64, 1), mask_draws(1, 3, np.arange(256), 256), MASK)
    by_block = masked.view(256, 4, 64).float().mean(-1)
    assert float(by_block[:, 1:].mean()) == pytest.approx(0.4, abs=0.01)
    assert ((by_block - t)[:, 1:].abs() < 5 * 0.5 / 8).all()


@pytest.mark.parametrize("name", SCHEDULES)
@given(st.floats(1e-3, 0.5), st.floats(0.51, 1))
@settings(max_examples=30, deadline=None)
def test_weight_is_one_over_rate_and_density(name: str, t_min: float, t_max: float) -> None:
    """E[w 1(masked)] is the measure of the rates that are drawn, and w p is 1 / q(p) by finite differences."""
    schedule = make_schedule(ScheduleConfig(name, t_min, t_max))
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    t = schedule.place(u)
    rate, weight = schedule.rate(t), schedule.weight(t)
    edges = schedule.rate(schedule.place(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    assert float((weight * rate).mean()) == pytest.approx(float(edges[1] - edges[0]), rel=1e-6)
    density = (u[2:] - u[:-2]) / (rate[2:] - rate[:-2])
    torch.testing.assert_close(weight[1:-1], 1 / (rate[1:-1] * density), rtol=1e-3, atol=0)


class Fixed:
    """A denoiser whose logits are a table of (token seen, position), or are made from the truth."""

    def __init__(self, truth: Tensor | None = None, seed: int | None = None, odds: float = 0.0):
        self.truth = truth
        self.odds = odds
        shape = (VOCAB, LENGTH, VOCAB)
        self.table = torch.zeros(shape)
        if seed is not None:
            self.table = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def __call__(self, x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor) -> Tensor:
        if self.truth is not None:
            return torch.where(torch.nn.functional.one_hot(self.truth[at], VOCAB) == 1, self.odds, -1e4)
        position = torch.arange(LENGTH).expand_as(x_t)
        return self.table[x_t[at], position[at]]


def text(batch: int) -> Tensor:
    return torch.randint(0, MASK, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def noise(batch: int, size: int, part: slice = slice(None)) -> Noise:
    slots = np.arange(batch)[part]
    return Noise(stratified_times(7, 0, slots, batch, LENGTH // size), mask_draws(7, 0, slots, LENGTH))


def loss_of(name: str, denoiser: Fixed, x0: Tensor, given_noise: Noise, schedule: Schedule | None = None) -> Loss:
    schedule = schedule or make_schedule(ScheduleConfig("log_linear", 1e-3, 1.0))
    return training_loss(name, denoiser, x0, None if name == AR else given_noise, schedule, MASK)


@pytest.mark.parametrize(("name", "size"), OBJECTIVES)
def test_uniform_denoiser_costs_log_v(name: str, size: int) -> None:
    """In expectation, a token nobody knows anything about costs log(V - 1), times the measure of t."""
    batch = 8192
    loss = loss_of(name, Fixed(), text(batch), noise(batch, size))
    measure = 1.0 if name == AR else 1 - 1e-3
    assert float(loss.loss) == pytest.approx(math.log(VOCAB - 1) * measure, rel=1e-6 if name == AR else 0.03)
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
    schedule = make_schedule(ScheduleConfig("log_linear", 0.31, 0.39))
    loss = loss_of(BD3, Fixed(), text(64), noise(64, 4), schedule)
    assert loss.bin_masked[3] > 0 and loss.bin_masked.sum() == loss.bin_masked[3]
