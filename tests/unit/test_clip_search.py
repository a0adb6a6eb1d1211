"""The search for the clip interval: candidates, the guard of sampling's start, variances from moments, the state."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.check_diffusion import SCHEDULES
from bd3_ds.config.load import load_defaults
from bd3_ds.config.schema import ClipSearchConfig
from bd3_ds.diffusion.clip_search import (
    ENOUGH,
    RATE_BINS,
    SINGLE,
    Moments,
    Spread,
    candidates,
    least,
    maskable,
    moment_sums,
    spread_sums,
)
from bd3_ds.diffusion.proposal import Exploring, make_proposal
from bd3_ds.train.state import Clip, TrainState
from tests.helpers.schedules import schedule_config


def search_config(**changes: object) -> ClipSearchConfig:
    search = load_defaults({"run_dir": "x", "data.train": "x"}, "a test").objective.clip_search
    return dataclasses.replace(search, **changes)


def test_candidates_are_the_papers_grid() -> None:
    """35 intervals and the whole one, where nothing is guarded."""
    found = candidates(search_config(min_coverage=0.0), schedule_config(), 4)
    assert len(found) == 36 and found[0] == (0.001, 1.0)
    widths = sorted({round(high - low, 2) for low, high in found[1:] if low > 0.001})
    assert widths == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert all(0.001 <= low < high <= 1 for low, high in found)
    assert (0.45, 0.95) in found and (0.3, 0.8) in found


@pytest.mark.parametrize(
    ("size", "kept", "dropped"),
    [(4, (0.3, 0.8), None), (16, (0.3, 0.8), (0.001, 0.5)), (128, (0.5, 1.0), (0.45, 0.95))],
)
def test_sampling_starts_where_training_was(size, kept, dropped) -> None:
    """Every candidate shows all-masked blocks often enough; the paper's choices stay, hopeless ones go."""
    search, schedule = search_config(), schedule_config()
    found = candidates(search, schedule, size)
    assert kept in found and dropped not in found
    for low, high in found[1:]:
        share = (high ** (size + 1) - low ** (size + 1)) / (size + 1) / (high - low)
        assert share * (size + 1) >= search.min_coverage * (1 - 1e-3)
    if dropped is not None:
        defended = dataclasses.replace(schedule, defensive=0.1)
        assert dropped in candidates(search, defended, size)


def test_block_size_one_may_mask_everything() -> None:
    """There the bound is the likelihood, and the rate 1 alone has no masking noise."""
    assert candidates(search_config(), schedule_config(), 1) == [(0.001, 1.0), SINGLE]
    assert candidates(search_config(), schedule_config(defensive=0.1), 1) == [(0.001, 1.0)]


def blocks(seed: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Rates from U[0, 1] and nats per token of blocks masked at them, tokens of unequal difficulty."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    masked = torch.rand(count, size, generator=generator, dtype=torch.float64) < rate
    cost = torch.rand(count, size, generator=generator, dtype=torch.float64) * 4 + 2 * rate
    return rate, (masked * cost).mean(1, keepdim=True)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("interval", [(0.3, 0.8), (0.45, 0.95), (0.1, 1.0)])
def test_variance_from_moments_is_that_of_drawing(name, interval) -> None:
    """Moments of plainly drawn blocks foretell the variance under any schedule and interval."""
    size, count = 4, 400_000
    rate, nats = blocks(0, count, size)
    moments = Moments().add(moment_sums(nats, rate)).settled()
    schedule = schedule_config(
        name=name, gaussian={"mu": 0.5, "sigma": 0.3}, bimodal={"sigma1": 0.3, "sigma2": 0.3, "mu2": 0.6}
    )
    proposal = make_proposal(schedule, interval=interval)
    generator = torch.Generator().manual_seed(1)
    drawn = proposal.rate(torch.rand(count, 1, generator=generator, dtype=torch.float64))
    masked = torch.rand(count, size, generator=generator, dtype=torch.float64) < drawn
    cost = torch.rand(count, size, generator=generator, dtype=torch.float64) * 4 + 2 * drawn
    truth = Spread.of(spread_sums((masked * cost).mean(1, keepdim=True), proposal.weight(drawn))).variance
    assert moments.variance(proposal) == pytest.approx(truth, rel=0.08)


def test_both_ways_choose_alike() -> None:
    """On blocks whose optimum is clear: 1/p explodes below, so the least variance is not at small rates."""
    rate, nats = blocks(2, 200_000, 4)
    tried = candidates(search_config(), schedule_config(), 4)
    moments = Moments().add(moment_sums(nats, rate)).settled()
    by_moments = {each: moments.variance(make_proposal(schedule_config(), interval=each)) for each in tried}
    by_drawing = {}
    for low, high in tried:
        inside = ((rate >= low) & (rate <= high))[:, 0]
        by_drawing[low, high] = Spread.of(spread_sums(nats[inside], 1 / rate[inside])).variance
    chosen = least(by_moments)
    assert chosen is not None and chosen[0] >= 0.4
    assert by_drawing[chosen] <= 1.05 * min(by_drawing.values())
    assert by_drawing[chosen] < 0.5 * by_drawing[tried[0]]


def test_unseen_rates_are_not_guessed() -> None:
    """A bin counts once it has shown enough blocks; an interval that needs another has no variance."""
    rate, nats = blocks(3, 20_000, 4)
    upper = rate[:, 0] > 0.5
    moments = Moments().add(moment_sums(nats[upper], rate[upper])).settled()
    assert math.isnan(moments.variance(make_proposal(schedule_config(), interval=(0.3, 0.8))))
    assert moments.variance(make_proposal(schedule_config(), interval=(0.5, 1.0))) > 0
    few = Moments().add(moment_sums(nats[: ENOUGH // 2], rate[: ENOUGH // 2])).settled()
    assert all(math.isnan(mean) for mean in few.mean)
    assert sum(few.fresh[0]) == ENOUGH // 2  # what is not enough yet is kept
    assert least({(0.0, 1.0): math.nan}) is None


def test_stale_bins_keep_their_last_means() -> None:
    rate, nats = blocks(4, 50_000, 4)
    before = Moments().add(moment_sums(nats, rate)).settled()
    upper = rate[:, 0] > 0.5
    after = before.add(moment_sums(2 * nats[upper], rate[upper])).settled()
    assert after.mean[:10] == before.mean[:10]
    assert after.mean[10:] == pytest.approx([2 * mean for mean in before.mean[10:]], rel=1e-9)


@given(st.floats(0.05, 0.6), st.floats(0.01, 0.5))
@settings(deadline=None, max_examples=25)
def test_exploring_shows_all_rates_and_keeps_the_scale(low: float, share: float) -> None:
    """A share of the blocks comes from the whole interval; a constant cost is still estimated as itself."""
    clipped, whole = (make_proposal(schedule_config(), interval=each) for each in ((low, low + 0.3), (0.001, 1.0)))
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    p, weight = Exploring(clipped, whole, share).draw(u)
    outside = ((p < low) | (p > low + 0.3)).double().mean()
    assert float(outside) == pytest.approx(share * (1 - 0.3 / 0.999), abs=1e-3)
    assert float((weight * p).mean()) == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(weight, 1 / p)  # log-linear time: 1/t in both parts


def test_one_density_for_clip_and_rest_is_no_clip_at_all() -> None:
    """Why exploring has weights of its own: an unbiased defended clip varies more than none, the exploring one less."""
    u = torch.rand(400_000, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def variance(proposal) -> float:
        rate, weight = proposal.draw(u)
        masked = torch.rand(len(u), 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64) < rate
        return Spread.of(spread_sums(masked.double().mean(1, keepdim=True), weight)).variance

    whole, clipped = make_proposal(schedule_config()), make_proposal(schedule_config(), interval=(0.45, 0.95))
    defended = make_proposal(schedule_config(defensive=0.1), interval=(0.45, 0.95))
    assert variance(clipped) < variance(Exploring(clipped, whole, 0.1)) < 0.6 * variance(whole)
    assert variance(defended) > 2 * variance(whole)


def test_first_block_has_a_token_less() -> None:
    assert maskable(3, 4).tolist() == [3, 4, 4]
    assert maskable(3, 1).tolist() == [0, 1, 1]


@given(
    st.dictionaries(st.sampled_from([1, 4, 16]), st.floats(0.01, 0.5), max_size=3),
    st.integers(0, 10**9),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_state_survives_a_checkpoint(intervals: dict[int, float], step: int, seed: int) -> None:
    """Through JSON and back: the interval in force and all moments, to the last bit, unseen bins included."""
    state = TrainState(step, 8 * step, 1024 * step)
    sums = torch.from_numpy(np.random.default_rng(seed).random((3, RATE_BINS))) * 40
    for size, low in intervals.items():
        state = state.with_clip(size, Clip((low, low + 0.5), Moments().add(sums).settled().add(sums)))
    again = TrainState.from_dict(json.loads(json.dumps(state.to_dict(), allow_nan=False)))
    assert again.to_dict() == state.to_dict()
    assert {size: clip.interval for size, clip in again.clips.items()} == {
        size: (low, low + 0.5) for size, low in intervals.items()
    }
