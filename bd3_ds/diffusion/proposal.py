"""Proposals: the distributions that training draws masking rates from, and the importance weight of each rate.

With q the density of the drawn rates, w(p) = 1 / (p q(p)) makes E_q[w(p) * sum of masked losses] the NELBO integral
over the rates that q covers (docs/objective.md). Divided by the length of that range it is on the scale of the NELBO
whatever the range is: a clip that moves during a run does not scale the gradient, and for log-linear time it is 1/t.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bd3_ds.config.registries import SCHEDULES, values_of
from bd3_ds.config.schema import ScheduleConfig
from bd3_ds.diffusion import schedule as shapes
from bd3_ds.diffusion.schedule import Schedule

Interval = tuple[float, float]  # of times t
DEFENSIVE_MIN = 1e-3  # the defensive share's smallest rate: 1/p has no variance down to 0


class RateProposal(Protocol):
    """A distribution of masking rates."""

    @property
    def covers_all(self) -> bool:
        """Whether all rates but a thousandth can be drawn, so that the training estimate is one of the bound."""

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Masking rates for uniform numbers u in [0, 1), and their weights; strata of u are strata of the rates."""


@dataclass(frozen=True)
class Proposal:
    """A schedule to draw from, or, without one, the single rate `lowest` = `highest`."""

    schedule: Schedule | None
    lowest: float
    highest: float

    @property
    def covers_all(self) -> bool:
        """See `RateProposal`; a single rate covers nothing."""
        return self.highest - self.lowest >= 1 - 2e-3

    def rate(self, u: Tensor) -> Tensor:
        """Masking rates for uniform numbers u in [0, 1); strata of u are strata of the proposal."""
        u = u.double()
        return torch.full_like(u, self.lowest) if self.schedule is None else self.schedule.rate(u)

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See `RateProposal`."""
        p = self.rate(u)
        return p, self.weight(p)

    def weight(self, p: Tensor) -> Tensor:
        """1 / (p q(p)), over the length of the range that q covers; its limit 1/p for a single rate."""
        if self.schedule is None:
            return 1 / p
        return 1 / (p * self.schedule.density(p) * (self.highest - self.lowest))

    @property
    def effective_share(self) -> float:
        """The share of blocks that would do as well if all counted alike: (sum of w p)^2 / (n sum of (w p)^2)."""
        p, weight = self.draw((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
        return float((p * weight).mean() ** 2 / (p * weight).square().mean())

    @property
    def mean_rate(self) -> float:
        """The expected masked share."""
        return self.all_masked_share(1)

    def all_masked_share(self, tokens: int) -> float:
        """The probability that all `tokens` tokens of a block are masked, where sampling starts: E_q[p^tokens]."""
        u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
        return float((self.rate(u) ** tokens).mean())


@dataclass(frozen=True)
class ExploringProposal:
    """A clipped proposal that also explores rates outside its interval: a `share` of the blocks is drawn from `whole`
    instead.

    Each block has the weight of the proposal that it came from. So the estimate is a mean of two estimates, steady
    where the clipped one is, and no bound; one density for both would weight the rare outer rates by 1/share.
    """

    clipped: Proposal
    whole: Proposal
    share: float
    covers_all = False

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See `RateProposal`."""
        u = u.double()
        explores = u < self.share
        outer = self.whole.draw((u / self.share).clamp(max=1))
        inner = self.clipped.draw(((u - self.share) / (1 - self.share)).clamp(min=0))
        return torch.where(explores, outer[0], inner[0]), torch.where(explores, outer[1], inner[1])


def base_schedule(config: ScheduleConfig, progress: float = 0.0) -> Schedule:
    """The named schedule over all t, after a share `progress` of the training."""
    kind = SCHEDULES[config.name]
    section = getattr(config, config.name, None)
    values = values_of(kind.parameters, config.parameters)
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        values = dataclasses.asdict(section)
    if kind.moves:
        values["progress"] = progress
    schedule: Schedule = kind.make(**values)
    return schedule


def make_proposal(config: ScheduleConfig, progress: float = 0.0, interval: Interval | None = None) -> Proposal:
    """The proposal of a checked configuration; `interval` of times stands for its t_min and t_max where one was found.

    The defensive share is mixed in after clipping: it keeps every rate possible and the weight at most 1/(share p).
    """
    t_min, t_max = interval or (config.t_min, config.t_max)
    schedule = base_schedule(config, progress)
    if t_min == t_max:
        rate = float(schedule.rate(torch.tensor(t_min, dtype=torch.float64)))
        return Proposal(None, rate, rate)
    schedule = shapes.restricted(schedule, t_min, t_max)
    if config.defensive > 0:
        everything = shapes.restricted(shapes.log_linear(), DEFENSIVE_MIN, 1.0)
        schedule = shapes.mixture((1 - config.defensive, schedule), (config.defensive, everything))
    return Proposal(schedule, schedule.lowest, schedule.highest)
