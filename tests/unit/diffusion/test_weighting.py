"""Reweighted losses, what the project's report printed for them against the bound, and upstream's values."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_ds.config.load import load_defaults
from bd3_ds.config.registries import WEIGHTS
from bd3_ds.config.schema import ObjectiveConfig, WeightConfig
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.likelihood import Texts
from bd3_ds.diffusion.proposal import base_schedule, make_proposal
from bd3_ds.diffusion.report_estimator import report_rates
from bd3_ds.diffusion.weighting import log_snr_of, loss_weight
from tests.helpers.schedules import schedule_config

VOCAB, MASK, LENGTH = 11, 10, 16
# The report's schedules, read from its code's values.
REPORT_BIMODAL = {"w1": 0.7, "mu1": 0.15, "sigma1": 0.02, "mu2": 0.4, "sigma2": 0.08}


def objective(weight: str = "elbo", k: float = 0.0, **schedule: object) -> ObjectiveConfig:
    run = load_defaults({"run_dir": "x", "data.train": "x"}, "a test")
    return dataclasses.replace(
        run.objective,
        schedule=schedule_config(**schedule),
        weight=WeightConfig(weight, k),
    )


@given(st.floats(1e-3, 0.999), st.floats(-5, 5))
@settings(deadline=None)
def test_weights_in_terms_of_the_clean_share(rate: float, k: float) -> None:
    """The forms by alpha = 1 - p in the paper's table; `simple` cancels the bound's own weight."""
    p = torch.tensor([rate], dtype=torch.float64)
    alpha, bound = 1 - p, 1 / p
    log_snr = float(log_snr_of(p))
    normal = math.exp(-0.5 * ((log_snr - 2.4) / 2.4) ** 2) / (2.4 * math.sqrt(2 * math.pi))
    expected = {
        "elbo": torch.ones_like(p),
        "edm": normal * (p / alpha + 0.25) / 0.25,
        "iddpm": 2 * (alpha * p).sqrt(),
        "sigmoid": p / (1 - (1 - math.exp(-k)) * alpha),
        "fm": (p / alpha).sqrt(),
        "simple": p,
    }
    assert set(expected) == set(WEIGHTS)
    for name, value in expected.items():
        torch.testing.assert_close(loss_weight(WeightConfig(name, k), p, bound), value * bound, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_finite_where_everything_is_masked(name: str) -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert bool(torch.isfinite(loss_weight(WeightConfig(name, 0.0), one, one)).all())


def uniform_denoiser(x0: Tensor):
    return lambda x_t, at, read: read.of_logits(torch.zeros(len(at), VOCAB))


def values(given_objective: ObjectiveConfig, size: int = 4, views: int = 400) -> tuple[float, float]:
    """What the report would have printed as its loss for a denoiser that knows nothing, and the bound; nats a token."""
    text = torch.randint(0, MASK, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    draw = partial(report_rates, objective=given_objective)
    reported = likelihood.monte_carlo(uniform_denoiser, Texts(text), size, MASK, views, seed=0, draw=draw)
    bound = likelihood.stratified(uniform_denoiser, Texts(text), size, MASK, views, seed=0)
    return reported.total / reported.tokens, bound.total / bound.tokens


def test_the_reports_bimodal_loss_is_twice_the_bound() -> None:
    """Wide components, so that all rates are drawn: 2 x. The report's narrow ones hide it: their tails are cut off."""
    wide = {"w1": 0.6, "mu1": 0.3, "sigma1": 0.4, "mu2": 0.7, "sigma2": 0.4}
    reported, bound = values(objective(name="bimodal", t_min=0.0, bimodal=wide))
    assert bound == pytest.approx(math.log(VOCAB - 1), rel=1e-6)
    assert reported / bound == pytest.approx(2.0, rel=0.02)
    narrow, bound = values(objective(name="bimodal", t_min=0.0, bimodal=REPORT_BIMODAL), views=4000)
    assert narrow / bound == pytest.approx(0.87, abs=0.05)


def test_the_reports_sigmoid_perplexity_is_the_square_root() -> None:
    """w(lambda) = p cancels 1/p: every masked token counts 1, which is half of the bound; exp of half is the root."""
    reported, bound = values(objective(weight="sigmoid", t_min=0.001))
    assert reported / bound == pytest.approx(0.5, rel=0.02)
    assert math.exp(reported) == pytest.approx(math.sqrt(math.exp(bound)), rel=0.05)


def test_the_reports_clipped_loss_leaves_out_what_is_not_drawn() -> None:
    """1/t on [0.3, 0.8] keeps its scale (a constant denoiser cannot tell); a Gaussian's 1/(p q) loses the tails."""
    clipped, bound = values(objective(t_min=0.3, t_max=0.8))
    assert clipped / bound == pytest.approx(1.0, rel=0.02)
    gaussian, bound = values(objective(name="gaussian", t_min=0.001))
    covered = make_proposal(schedule_config(name="gaussian", t_min=0.001, t_max=1.0))
    assert gaussian / bound == pytest.approx(covered.highest - covered.lowest, abs=0.12)
    assert gaussian / bound < 0.85


def test_plain_report_is_the_papers_protocol() -> None:
    draw = report_rates(torch.linspace(0, 0.999, 50, dtype=torch.float64), objective())
    torch.testing.assert_close(draw, likelihood.paper_rates(torch.linspace(0, 0.999, 50, dtype=torch.float64)))


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "noise_schedules.npz") as values:
        return {key: torch.from_numpy(values[key]) for key in values}


UPSTREAM = {
    "loglinear": "log_linear",
    "square": "square",
    "square_root": "square_root",
    "log": "logarithmic",
    "cosine": "cosine",
}


@pytest.mark.parametrize("theirs", UPSTREAM)
def test_schedules_are_upstreams(golden, theirs) -> None:
    """p(t) and p'(t)/p(t), but for upstream's floor of 1e-3 under square's rate and the 1e-3 added to cosine's."""
    t = golden["t.f64"]
    schedule = base_schedule(schedule_config(name=UPSTREAM[theirs]))
    rate = schedule.rate(t)
    free = t**2 > 1e-3 if theirs == "square" else torch.ones_like(t, dtype=torch.bool)
    torch.testing.assert_close(rate[free], golden[f"{theirs}.move_chance.f64"][free], rtol=1e-8, atol=1e-12)
    slope = 1 / (rate * schedule.density(rate))
    if theirs == "cosine":
        slope = slope * rate / (rate + 1e-3)
    torch.testing.assert_close(slope[free], -golden[f"{theirs}.loss_scaling.f64"][free], rtol=1e-7, atol=0)
    if theirs == "square":
        assert int((~free).sum()) == 7
        assert bool((golden["square.move_chance.f64"][~free] == 1e-3).all())


@pytest.mark.parametrize("theirs", UPSTREAM)
def test_report_has_upstreams_values_where_they_are_not_right_too(golden, theirs) -> None:
    report_slopes(golden, theirs, objective(name=UPSTREAM[theirs]), prefix="")


def report_slopes(
    golden, name: str, given_objective: ObjectiveConfig, progress: float = 0.0, prefix: str = "fork."
) -> None:
    t = golden["t.f64"]
    u = (t - given_objective.schedule.t_min) / (1 - given_objective.schedule.t_min)
    rate, weight = report_rates(u, given_objective, progress)
    torch.testing.assert_close(rate, golden[f"{prefix}{name}.move_chance.f64"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weight, -golden[f"{prefix}{name}.loss_scaling.f64"], rtol=2e-5, atol=0)


def test_the_reports_gaussian_and_bimodal_values(golden) -> None:
    """The estimator `report` has the values of the report's own code, mu2's movement included."""
    report_slopes(golden, "gaussian", objective(name="gaussian"))
    bimodal = {**REPORT_BIMODAL, "mu2_end": 0.85}
    report_slopes(golden, "bimodal_p0", objective(name="bimodal", bimodal=bimodal), 0.0)
    report_slopes(golden, "bimodal_p0.5", objective(name="bimodal", bimodal=bimodal), 0.5)


def test_bimodal_weight_of_ours_is_below_the_reports() -> None:
    """1/(p q) with the mixture's density is below the report's weight everywhere: q adds what the other one draws."""
    bimodal = {**REPORT_BIMODAL, "sigma1": 0.4, "sigma2": 0.4}
    both = objective(name="bimodal", t_min=0.0, bimodal=bimodal)
    p, theirs = report_rates(torch.linspace(0.011, 0.991, 99, dtype=torch.float64), both)
    ours = make_proposal(both.schedule).weight(p)
    assert bool((ours < theirs).all())


@pytest.mark.parametrize("name", ["edm", "iddpm", "sigmoid", "fm"])
def test_reweighting_is_the_reports(golden, name) -> None:
    """All values but those at t = 1, where theirs are nan, inf or 0 by clamping and ours are finite."""
    p = 1 - golden["fork.w.a_t.f64"][:-1]
    ours = loss_weight(WeightConfig(name, 0.0), p, torch.ones_like(p))
    torch.testing.assert_close(ours, golden[f"fork.w.{name}.f64"][:-1], rtol=1e-6, atol=1e-9)
    simple = loss_weight(WeightConfig("simple", 0.0), p, 1 / p)
    torch.testing.assert_close(simple, golden["fork.w.simple.f64"][:-1] / p, rtol=1e-6, atol=1e-9)
