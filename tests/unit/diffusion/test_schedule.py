"""Noise schedules, their mixtures and clips, and the proposals made of them: distributions and unbiased weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.registries import SCHEDULES
from bd3_ds.diffusion import schedule as shapes
from bd3_ds.diffusion.proposal import DEFENSIVE_MIN, Proposal, make_proposal
from bd3_ds.diffusion.schedule import Schedule
from tests.helpers.schedules import schedule_config

NAMED = {
    "log_linear": shapes.log_linear(),
    "square": shapes.power(2.0),
    "square_root": shapes.power(0.5),
    "logarithmic": shapes.logarithmic(),
    "cosine": shapes.cosine(),
    "gaussian": shapes.gaussian(0.5, 0.1),
    "wide gaussian": shapes.gaussian(0.3, 1.0),
    "narrow gaussian": shapes.gaussian(0.9, 0.02),
    "bimodal": shapes.mixture((0.7, shapes.gaussian(0.15, 0.02)), (0.3, shapes.gaussian(0.4, 0.08))),
}
uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


@pytest.mark.parametrize("name", NAMED)
def test_rate_time_and_density_belong_together(name: str) -> None:
    """The CDF inverts the quantile function, both rise, and the density is the slope of the CDF."""
    schedule = NAMED[name]
    t = uniform[::37]
    p = schedule.rate(t)
    torch.testing.assert_close(schedule.time(p), t, rtol=1e-9, atol=1e-9)
    assert bool((p.diff() > 0).all()) and float(p.min()) >= 0 and float(p.max()) <= 1
    step = 1e-7
    inner = p[(p > schedule.lowest + 1e-4) & (p < schedule.highest - 1e-4)]
    slope = (schedule.time(inner + step) - schedule.time(inner - step)) / (2 * step)
    torch.testing.assert_close(schedule.density(inner), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMED)
@given(st.floats(0, 0.8), st.floats(0.05, 0.2))
@settings(max_examples=15, deadline=None)
def test_clipped_times_are_a_schedule_of_their_own(name: str, t_min: float, width: float) -> None:
    clipped = shapes.restricted(NAMED[name], t_min, t_min + width)
    p = clipped.rate(uniform[::101])
    assert clipped.lowest - 1e-12 <= float(p.min()) and float(p.max()) <= clipped.highest + 1e-12
    torch.testing.assert_close(clipped.time(p), uniform[::101], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(clipped.density(p), NAMED[name].density(p) / width)
    outside = torch.tensor([clipped.lowest - 0.01, clipped.highest + 0.01], dtype=torch.float64)
    assert clipped.density(outside.clamp(0, 1))[outside.clamp(0, 1) == outside].abs().sum() == 0


def test_mixture_draws_each_part_by_its_share() -> None:
    """The number of draws below the gap between two far parts is the first part's share, exactly by quantiles."""
    both = shapes.mixture((0.7, shapes.gaussian(0.15, 0.02)), (0.3, shapes.gaussian(0.8, 0.03)))
    p = both.rate(uniform)
    assert float((p < 0.5).double().mean()) == pytest.approx(0.7, abs=1e-4)
    assert float(p[p < 0.5].mean()) == pytest.approx(0.15, abs=1e-4)
    assert float(p[p > 0.5].std()) == pytest.approx(0.03, rel=1e-2)


def integral(cost, low: float = 0.0, high: float = 1.0) -> float:
    """Midpoint rule of cost over rates, dense enough for 1e-6."""
    p = low + (high - low) * (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    return float(cost(p).mean()) * (high - low)


def cost_of_block(p: Tensor) -> Tensor:
    """(1/p) E[sum of masked losses] of a block whose tokens are the harder the more of it is masked."""
    return 1 + 2 * p**2


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "bimodal"])
def test_weight_gives_the_bound_whatever_the_schedule(name: str) -> None:
    """E_q[w(p) p cost(p)] is the integral of cost over all rates, by quantiles of a schedule that covers them."""
    proposal = make_proposal(schedule_config(name=name, t_min=0.0, gaussian={"mu": 0.5, "sigma": 0.25}))
    assert proposal.covers_all
    p = proposal.rate(uniform)
    value = float((proposal.weight(p) * p * cost_of_block(p)).mean())
    assert value == pytest.approx(integral(cost_of_block), rel=2e-3)


def test_mixture_density_gives_the_bound_and_component_densities_give_twice_it() -> None:
    """Report eq. (7) weights each draw by its own component's density; both cover (0, 1), so all counts twice."""
    parts = [(0.7, shapes.gaussian(0.3, 0.3)), (0.3, shapes.gaussian(0.7, 0.3))]
    proposal = make_proposal(
        schedule_config(
            name="bimodal",
            t_min=0.0,
            bimodal={"w1": 0.7, "mu1": 0.3, "sigma1": 0.3, "mu2": 0.7, "sigma2": 0.3},
        )
    )
    p = proposal.rate(uniform)
    right = float((proposal.weight(p) * p * cost_of_block(p)).mean())
    assert right == pytest.approx(integral(cost_of_block), rel=1e-4)
    by_component = 0.0
    for share, part in parts:
        p = part.rate(uniform)
        by_component += share * float((cost_of_block(p) / (share * part.density(p))).mean())
    assert by_component == pytest.approx(2 * integral(cost_of_block), rel=1e-4)


def test_gaussian_with_clamped_quantiles_is_told_from_the_one_without() -> None:
    """Clamped quantiles cut rates off. The weight then gives the integrand's mean over what is left, not the bound."""
    clamped = make_proposal(schedule_config(name="gaussian", t_min=0.001, t_max=0.999))
    assert (clamped.lowest, clamped.highest) == pytest.approx((0.1910, 0.8090), abs=1e-4)
    assert not clamped.covers_all
    p = clamped.rate(uniform)
    value = float((clamped.weight(p) * p * cost_of_block(p)).mean())
    part = integral(cost_of_block, clamped.lowest, clamped.highest)
    assert value == pytest.approx(part / (clamped.highest - clamped.lowest), rel=1e-4)
    # As the report weights it, 1 / (p q(p)) of the whole Gaussian, the part that is drawn is all that counts.
    whole = shapes.gaussian(0.5, 0.1)
    t = 0.001 + 0.998 * uniform
    reported = 0.998 * float((cost_of_block(whole.rate(t)) / whole.density(whole.rate(t))).mean())
    assert reported == pytest.approx(part, rel=1e-3)
    assert part / integral(cost_of_block) < 0.62


@given(
    st.sampled_from(list(SCHEDULES)),
    st.floats(0, 0.9),
    st.floats(0.05, 1),
    st.floats(0.05, 0.9),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_defended_proposals_cover_everything_and_bound_the_weight(
    name: str, t_min: float, width: float, share: float, seed: int
) -> None:
    config = schedule_config(name=name, t_min=t_min, t_max=min(1.0, t_min + width), defensive=share)
    proposal = make_proposal(config)
    p = proposal.rate(torch.rand(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    assert proposal.covers_all and bool(((p >= 0) & (p <= 1)).all())
    weight = proposal.weight(p)
    shared = p >= DEFENSIVE_MIN  # rates below it come from the schedule alone
    assert bool((weight <= 1 / (share * p) * (1 + 1e-9))[shared].all()) and bool((weight > 0).all())


def test_single_rate_is_the_limit_of_narrow_intervals() -> None:
    narrow, single = (make_proposal(schedule_config(t_min=low, t_max=1.0)) for low in (1 - 1e-6, 1.0))
    p = narrow.rate(uniform[:5])
    torch.testing.assert_close(narrow.weight(p), single.weight(p), rtol=1e-5, atol=1e-5)
    assert bool((single.rate(uniform[:5]) == 1).all())


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 40), st.floats(0, 0.5), st.floats(0.55, 1))
@settings(max_examples=40, deadline=None)
def test_all_masked_share_is_an_expectation(name: str, tokens: int, t_min: float, t_max: float) -> None:
    proposal = make_proposal(schedule_config(name=name, t_min=t_min, t_max=t_max))
    share = proposal.all_masked_share(tokens)
    assert 0 <= share <= proposal.highest**tokens + 1e-9
    assert share == pytest.approx(float((proposal.rate(uniform) ** tokens).mean()), abs=1e-3)
    if name == "log_linear":
        exact = (t_max ** (tokens + 1) - t_min ** (tokens + 1)) / (tokens + 1) / (t_max - t_min)
        assert share == pytest.approx(exact, rel=1e-3, abs=1e-12)


def test_second_mean_moves_and_stays() -> None:
    fixed = schedule_config(name="bimodal", t_min=0.0)
    moving = schedule_config(name="bimodal", t_min=0.0, bimodal={"mu2_end": 0.85})
    means = [make_proposal(moving, progress).mean_rate for progress in (0.0, 0.5, 1.0)]
    assert means[0] == pytest.approx(make_proposal(fixed, 1.0).mean_rate) and means[0] < means[1] < means[2]
    assert shapes.moved_mu2(0.4, 0.85, 0.5) == pytest.approx(0.4 + 0.45 * (1 - math.exp(-1.5)))


def test_strata_of_u_are_strata_of_the_proposal() -> None:
    """Rates rise with u also in a mixture, so a stratified u spreads the rates over the whole density."""
    for name in SCHEDULES:
        proposal: Proposal = make_proposal(schedule_config(name=name, defensive=0.1))
        assert proposal.schedule is not None
        assert bool((proposal.rate(uniform[::7]).diff() >= 0).all())


def as_numpy(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    return schedule.rate(torch.from_numpy(t)).numpy()


@pytest.mark.parametrize("name", NAMED)
def test_extreme_times_give_rates_in_range(name: str) -> None:
    p = as_numpy(NAMED[name], np.array([0.0, 1e-300, 1e-12, 1 - 1e-12, 1.0]))
    assert np.isfinite(p).all() and (p >= 0).all() and (p <= 1).all()
