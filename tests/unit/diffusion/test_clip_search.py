"""The search for the clip interval: candidates, the guard of sampling's start, variances from moments, the state."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.load import load_defaults
from bd3_ds.config.registries import SCHEDULES
from bd3_ds.config.schema import ObjectiveConfig, WeightConfig
from bd3_ds.diffusion.clip_search import (
    ENOUGH,
    SINGLE,
    TIME_BINS,
    Moments,
    Spread,
    binned,
    candidates,
    least,
    moment_sums,
    spread_sums,
    within_variance,
)
from bd3_ds.diffusion.noise import scored_positions
from bd3_ds.diffusion.proposal import ExploringProposal, base_schedule, make_proposal
from bd3_ds.diffusion.schedule import Schedule
from bd3_ds.train.state import Clip, TrainState
from tests.helpers.schedules import schedule_config


def objective(weight: str = "elbo", search: dict[str, Any] | None = None, **schedule: Any) -> ObjectiveConfig:
    """The default objective with another weight, search and schedule."""
    default = load_defaults({"run_dir": "x", "data.train": "x"}, "a test").objective
    return dataclasses.replace(
        default,
        schedule=schedule_config(**schedule),
        weight=WeightConfig(weight, 0.0),
        clip_search=dataclasses.replace(default.clip_search, **(search or {})),
    )


def test_candidates_are_the_papers_grid() -> None:
    """35 intervals and the whole one, where nothing is guarded."""
    found = candidates(objective(search={"min_coverage": 0.0}), 4)
    assert len(found) == 36 and found[0] == (0.001, 1.0)
    widths = sorted({round(high - low, 2) for low, high in found[1:] if low > 0.001})
    assert widths == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert (0.45, 0.95) in found and (0.3, 0.8) in found


@given(st.floats(0, 0.9), st.floats(0.01, 1), st.sampled_from([2, 4, 16]))
@settings(deadline=None, max_examples=30)
def test_candidates_lie_in_the_configured_interval(t_min: float, width: float, size: int) -> None:
    """Whatever it is; none is turned round or much narrower than a width that was asked for."""
    t_max = min(1.0, t_min + width)
    found = candidates(objective(t_min=t_min, t_max=t_max), size)
    assert found[0] == (t_min, t_max) and len(set(found)) == len(found)
    for low, high in found[1:]:
        assert t_min <= low < high <= t_max
        assert min(abs(high - low - asked) for asked in (0.5, 0.6, 0.7, 0.8, 0.9)) <= 0.025


@pytest.mark.parametrize(
    ("size", "kept", "dropped"),
    [(4, (0.3, 0.8), None), (16, (0.3, 0.8), (0.001, 0.5)), (128, (0.5, 1.0), (0.45, 0.95))],
)
def test_sampling_starts_where_training_was(size, kept, dropped) -> None:
    """Every candidate shows all-masked blocks often enough; the paper's choices stay, hopeless ones go."""
    found = candidates(objective(), size)
    assert kept in found and dropped not in found
    for low, high in found[1:]:
        share = (high ** (size + 1) - low ** (size + 1)) / (size + 1) / (high - low)
        assert share * (size + 1) >= 0.02 * (1 - 1e-3)
    if dropped is not None:
        assert dropped in candidates(objective(defensive=0.1), size)


def test_block_size_one_may_mask_everything() -> None:
    """There the bound is the likelihood, and rate 1 has no masking noise; not under a weight that is 0 there."""
    assert candidates(objective(), 1) == [(0.001, 1.0), SINGLE]
    for other in (objective(defensive=0.1), objective("iddpm"), objective("fm"), objective(t_max=0.9)):
        assert SINGLE not in candidates(other, 1)


def blocks(seed: int, count: int, size: int, rate: Tensor) -> Tensor:
    """Nats per token [count, 1] of blocks masked at `rate` [count, 1], tokens the harder the more is masked."""
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(count, size, generator=generator, dtype=torch.float64) < rate
    cost = torch.rand(count, size, generator=generator, dtype=torch.float64) * 2 + 3 + 3 * rate
    return (masked * cost).mean(1, keepdim=True)


def moments_of(schedule: Schedule, nats: Tensor, rate: Tensor) -> Moments:
    return Moments().add(moment_sums(nats, rate, schedule)).settled()


WIDE = {"gaussian": {"mu": 0.5, "sigma": 0.3}, "bimodal": {"sigma1": 0.3, "sigma2": 0.3, "mu2": 0.6}}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 4) for name in SCHEDULES),
        *(
            pytest.param(name, 128, marks=() if name == "log_linear" else pytest.mark.slow)
            for name in SCHEDULES
            if name not in WIDE
        ),
    ],
)
def test_variance_from_moments_is_that_of_stratified_batches(name, size) -> None:
    """Moments of plainly drawn blocks foretell N Var(mean of N stratified blocks) under any clip."""
    config = schedule_config(name=name, t_min=0.001, **WIDE)
    schedule, batch, batches = base_schedule(config), 256, 1000 if size > 64 else 3000
    strata = (torch.arange(batch, dtype=torch.float64) + torch.rand(batches, batch, dtype=torch.float64)) / batch
    rate = make_proposal(config).rate(strata.view(-1, 1))
    moments = moments_of(schedule, blocks(0, len(rate), size, rate), rate)
    for interval in ((0.001, 1.0), (0.001, 0.5), (0.3, 0.8), (0.5, 1.0)):
        proposal = make_proposal(config, interval=interval)
        rate = proposal.rate(strata.view(-1, 1))
        means = (proposal.weight(rate) * blocks(1, len(rate), size, rate)).view(batches, batch).mean(1)
        truth = batch * float(means.var())
        error = 4 * math.sqrt(2 / batches)
        assert moments.variance(schedule, interval) == pytest.approx(truth, rel=error + 0.1), interval


def test_both_ways_choose_alike() -> None:
    """On blocks whose optimum is clear: 1/p explodes below, so the least variance is not at small rates."""
    schedule = base_schedule(schedule_config())
    u = (torch.arange(200_000, dtype=torch.float64)[:, None] + 0.5) / 200_000
    rate = make_proposal(schedule_config()).rate(u)
    moments = moments_of(schedule, blocks(2, len(u), 4, rate), rate)
    tried = candidates(objective(), 4)
    by_moments = {each: moments.variance(schedule, each) for each in tried}
    by_drawing = {}
    for interval in tried:
        p, weight = make_proposal(schedule_config(), interval=interval).draw(u)
        by_drawing[interval] = within_variance(binned(blocks(3, len(u), 4, p), weight, u, TIME_BINS))
    chosen = least(by_moments)
    assert chosen is not None and chosen[0] >= 0.4
    assert by_drawing[chosen] <= 1.05 * min(by_drawing.values())
    assert by_drawing[chosen] < 0.5 * by_drawing[tried[0]]
    assert [by_moments[each] for each in tried] == pytest.approx([by_drawing[each] for each in tried], rel=0.2)


def test_what_stratification_removes_is_not_counted_again() -> None:
    """Blocks whose loss is a function of the rate alone have no variance inside a stratum, however it moves."""
    u = (torch.arange(100_000, dtype=torch.float64)[:, None] + 0.5) / 100_000
    rate, weight = make_proposal(schedule_config()).draw(u)
    sums = binned(rate * (3 + 3 * rate), weight, u, TIME_BINS)
    assert Spread.of(sums.sum(1)).variance > 0.5
    assert within_variance(sums) < 0.01


def test_unseen_times_are_not_guessed() -> None:
    """A bin counts once it has shown enough blocks; an interval that needs another has no variance."""
    schedule = base_schedule(schedule_config())
    rate = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    nats, upper = blocks(3, len(rate), 4, rate), rate[:, 0] > 0.5
    moments = moments_of(schedule, nats[upper], rate[upper])
    assert math.isnan(moments.variance(schedule, (0.3, 0.8)))
    assert moments.variance(schedule, (0.5, 1.0)) > 0
    few = moments_of(schedule, nats[: ENOUGH // 2], rate[: ENOUGH // 2])
    assert all(math.isnan(mean) for mean in few.mean)
    assert sum(few.fresh[0]) == ENOUGH // 2  # what is not enough yet is kept


def test_numbers_that_are_not_finite_are_never_the_least() -> None:
    assert least({(0.0, 1.0): math.nan}) is None
    assert least({(0.0, 1.0): math.inf, (0.5, 1.0): 3.0}) == (0.5, 1.0)
    one = torch.ones(4, 2, dtype=torch.float64)
    assert math.isnan(within_variance(binned(one, one * math.inf, one / 2, 1)))
    assert math.isnan(within_variance(binned(one * math.nan, one, one / 2, 1)))


def test_stale_bins_keep_their_last_means() -> None:
    schedule = base_schedule(schedule_config())
    rate = torch.rand(50_000, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    nats, upper = blocks(4, len(rate), 4, rate), rate[:, 0] > 0.5
    before = moments_of(schedule, nats, rate)
    after = before.add(moment_sums(2 * nats[upper], rate[upper], schedule)).settled()
    assert after.mean[:10] == before.mean[:10]
    assert after.mean[10:] == pytest.approx([2 * mean for mean in before.mean[10:]], rel=1e-9)


@given(st.floats(0.05, 0.6), st.floats(0.01, 0.5))
@settings(deadline=None, max_examples=25)
def test_exploring_shows_all_rates_and_keeps_the_scale(low: float, share: float) -> None:
    """A share of the blocks comes from the whole interval; a constant cost is still estimated as itself."""
    clipped, whole = (make_proposal(schedule_config(), interval=each) for each in ((low, low + 0.3), (0.001, 1.0)))
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    p, weight = ExploringProposal(clipped, whole, share).draw(u)
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
    assert variance(clipped) < variance(ExploringProposal(clipped, whole, 0.1)) < 0.6 * variance(whole)
    assert variance(defended) > 2 * variance(whole)


def test_first_block_has_a_token_less() -> None:
    for size, expected in ((4, [3, 4, 4]), (1, [0, 1, 1])):
        assert scored_positions(torch.zeros(1, 3 * size)).view(3, size).sum(1).tolist() == expected


@given(
    st.dictionaries(st.sampled_from([1, 4, 16]), st.floats(0.01, 0.5), max_size=3),
    st.integers(0, 10**9),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_state_survives_a_checkpoint(intervals: dict[int, float], step: int, seed: int) -> None:
    """Through JSON and back: the interval in force and all moments, to the last bit, unseen bins included."""
    state = TrainState(step, 8 * step, 1024 * step)
    sums = torch.from_numpy(np.random.default_rng(seed).random((3, TIME_BINS))) * 40
    for size, low in intervals.items():
        state = state.with_clip(size, Clip((low, low + 0.5), Moments().add(sums).settled().add(sums)))
    again = TrainState.from_dict(json.loads(json.dumps(state.to_dict(), allow_nan=False)))
    assert again.to_dict() == state.to_dict()
    assert {size: clip.interval for size, clip in again.clips.items()} == {
        size: (low, low + 0.5) for size, low in intervals.items()
    }
