"""The losses that the project's report printed, kept to reproduce its tables beside the true bound. Never a perplexity.

Its validation loss took the training schedule and weight: -log p at masked tokens times p'(t)/p(t) for t ~ U[1e-3, 1],
times the reweighting. That is not the bound where
  - the schedule is bimodal: each component covers (0, 1) by itself and is weighted by its own derivative, so that the
    two together count everything twice, but for what clamped quantiles cut off;
  - the schedule is clipped or Gaussian: rates that are never drawn do not count;
  - a reweighting is in force: with sigmoid(0) and log-linear time the weight is p * (1/p) = 1, about half the bound,
    and exp of that is about the square root of the perplexity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_ds.config.schema import ObjectiveConfig
from bd3_ds.diffusion.proposal import base_schedule
from bd3_ds.diffusion.schedule import Schedule, gaussian, moved_mu2
from bd3_ds.diffusion.weighting import loss_weight

QUANTILE_MIN = 1e-6  # its quantiles are clamped to [1e-6, 1 - 1e-6]
RATE_MIN = 1e-3  # its square schedule has no smaller rates, and cosine's slope p'/p is divided by p + 1e-3


def report_rates(u: Tensor, objective: ObjectiveConfig, progress: float = 0.0) -> tuple[Tensor, Tensor]:
    """Masking rates and loss weights for u in (0, 1), fp64, as the report's code has them: a likelihood.RateDraw."""
    schedule = objective.schedule
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * u.double()
    if schedule.name == "bimodal":
        rate, slope = _bimodal(t, objective, progress)
    elif schedule.name == "gaussian":
        rate, slope = _rate_and_slope(base_schedule(schedule), t.clamp(QUANTILE_MIN, 1 - QUANTILE_MIN))
    else:
        rate, slope = _rate_and_slope(base_schedule(schedule), t)
        if schedule.name == "square":
            rate, slope = rate.clamp(min=RATE_MIN), slope * (rate / rate.clamp(min=RATE_MIN))
        if schedule.name == "cosine":
            slope = slope * (rate / (rate + RATE_MIN))
    return rate, loss_weight(objective.weight, rate, slope)


def _rate_and_slope(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """p(t) and p'(t) / p(t)."""
    rate = schedule.rate(t)
    return rate, 1 / (rate * schedule.density(rate))


def _bimodal(t: Tensor, objective: ObjectiveConfig, progress: float) -> tuple[Tensor, Tensor]:
    """Times below w1 go through the first component, the others through the second, each with its own derivative."""
    two = objective.schedule.bimodal
    mu2 = two.mu2 if two.mu2_end is None else moved_mu2(two.mu2, two.mu2_end, progress)
    t = t.clamp(QUANTILE_MIN, 1 - QUANTILE_MIN)
    first_rate, first_slope = _rate_and_slope(gaussian(two.mu1, two.sigma1), (t / two.w1).clamp(max=1))
    rest = 1 - two.w1
    second_rate, second_slope = _rate_and_slope(gaussian(mu2, two.sigma2), ((t - two.w1) / rest).clamp(min=0))
    first = t < two.w1
    return (
        torch.where(first, first_rate, second_rate),
        torch.where(first, first_slope / two.w1, second_slope / rest),
    )
