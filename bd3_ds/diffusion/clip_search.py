"""Clip search: the interval of times whose estimate of the bound has the least variance (paper, section 5.3).

Two ways to know an interval's variance:
  grid     a forward pass of every candidate on held-out batches, as in the paper (`candidates`, `binned`,
           `within_variance`)
  moments  none at all: training batches leave moments of a block's estimate by its time (`Moments`), from which the
           variance under any interval is a weighted sum

The variance is that of a batch's estimate times the number of its blocks, in (nats per token)^2. Times are stratified
over the batch, so it is the variance at a given time, averaged over times: how the mean moves with time adds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd3_ds.config.registries import WEIGHTS
from bd3_ds.config.schema import ObjectiveConfig
from bd3_ds.diffusion.proposal import Interval, make_proposal
from bd3_ds.diffusion.schedule import Schedule

GRID = 0.05
TIME_BINS = 20  # bins of `Moments`, as wide as the grid
HELD_OUT_BINS = 256  # at most, of the grid search
ENOUGH = 16  # blocks that a bin must have seen to count
SINGLE: Interval = (1.0, 1.0)


def candidates(objective: ObjectiveConfig, block_size: int, progress: float = 0.0) -> list[Interval]:
    """The configured interval, then those on a 0.05 grid inside it, of each width, where sampling's start is covered.

    Sampling starts from a fully masked block. An interval counts if the proposal shows such a block at least
    `min_coverage` times as often as log-linear time on (0, 1] does, which is 1 / (L' + 1). With block size 1 the one
    other candidate is the time 1, at which the bound is the likelihood; weights that vanish or explode there forbid it.
    """
    search, schedule = objective.clip_search, objective.schedule
    whole = (schedule.t_min, schedule.t_max)
    if block_size == 1:
        single = schedule.defensive == 0 and schedule.t_max == 1 and WEIGHTS[objective.weight.name].single_rate
        return [whole, SINGLE] if single else [whole]
    found = [whole]
    for width in search.widths:
        for index in range(round((1 - width) / GRID) + 1):
            interval = (
                max(round(index * GRID, 6), schedule.t_min),
                min(round(index * GRID + width, 6), schedule.t_max),
            )
            if interval[1] - interval[0] < width - GRID / 2 or interval in found:
                continue
            share = make_proposal(schedule, progress, interval).all_masked_share(block_size)
            if share >= search.min_coverage / (block_size + 1):
                found.append(interval)
    return found


@dataclass(frozen=True)
class Spread:
    """Mean and variance of numbers, as sums that add up over micro-batches and ranks."""

    count: float
    total: float
    squares: float

    @classmethod
    def of(cls, sums: Tensor) -> Spread:
        """From [3]: how many, their sum, the sum of their squares."""
        return cls(*sums.tolist())

    @property
    def mean(self) -> float:
        """nan for no numbers."""
        return self.total / self.count if self.count else float("nan")

    @property
    def variance(self) -> float:
        """Unbiased; nan for fewer than two numbers and where one is not finite."""
        if self.count < 2 or not math.isfinite(self.squares):
            return float("nan")
        return max(0.0, self.squares - self.total**2 / self.count) / (self.count - 1)


def spread_sums(block_nats: Tensor, weight: Tensor) -> Tensor:
    """[3] for `Spread` of the blocks' estimates weight * nats; arguments as for `binned`."""
    return binned(block_nats, weight, torch.zeros_like(weight), 1)[:, 0]


def binned(block_nats: Tensor, weight: Tensor, place: Tensor, bins: int) -> Tensor:
    """[3, bins]: number, sum and sum of squares of the blocks' estimates weight * nats, by `place` in [0, 1].

    All arguments are [b, B]; block_nats are nats per maskable token, nan where a block has no such token.
    """
    known = ~block_nats.isnan()
    # No indexing by `known`, for which a GPU's host would have to wait.
    estimate = torch.where(known, weight * block_nats, 0.0).flatten()
    index = (place * bins).long().clamp(0, bins - 1).flatten()
    sums = torch.zeros(3, bins, dtype=torch.float64, device=estimate.device)
    return sums.index_add_(1, index, torch.stack([known.flatten().double(), estimate, estimate.square()]))


def within_variance(sums: Tensor) -> float:
    """The variance inside the bins of `binned` sums, averaged over numbers; nan where too little is known."""
    spreads = [Spread.of(column) for column in sums.T if column[0] >= 2]
    total = sum(spread.count for spread in spreads)
    return sum(spread.count * spread.variance for spread in spreads) / total if total else float("nan")


def moment_sums(block_nats: Tensor, rate: Tensor, schedule: Schedule) -> Tensor:
    """[3, TIME_BINS]: number of blocks, sums of s/p and of (w0 s)^2, by the time that `schedule` gives the rate p.

    s are nats per maskable token, w0 = 1/(p q(p)) the weight under the unclipped schedule; all else as for `binned`.
    """
    known = ~block_nats.isnan() & (rate > 0)
    p = torch.where(known, rate, 1.0)
    per_rate = torch.where(known, block_nats, 0.0) / p
    values = torch.stack([known.double(), per_rate, (per_rate / schedule.density(p)).square()])
    index = (schedule.time(p) * TIME_BINS).long().clamp(0, TIME_BINS - 1).flatten()
    sums = torch.zeros(3, TIME_BINS, dtype=torch.float64, device=p.device)
    return sums.index_add_(1, index, torch.where(known, values, 0.0).flatten(1))


@dataclass(frozen=True)
class Moments:
    """What training has seen of a block size: per bin of times the means of s/p and of (w0 s)^2, and `fresh`.

    `fresh` are `moment_sums` since the last search. They replace a bin's means once there are ENOUGH blocks; until then
    a bin keeps its last ones. The exploring share of the blocks sees to it that every bin gets there.
    """

    mean: tuple[float, ...] = (float("nan"),) * TIME_BINS
    square: tuple[float, ...] = (float("nan"),) * TIME_BINS
    fresh: tuple[tuple[float, ...], ...] = ((0.0,) * TIME_BINS,) * 3

    def add(self, sums: Tensor) -> Moments:
        """With one step's `moment_sums`."""
        fresh = torch.tensor(self.fresh, dtype=torch.float64) + sums.cpu()
        return Moments(self.mean, self.square, tuple(map(tuple, fresh.tolist())))

    def settled(self) -> Moments:
        """Means renewed where enough fresh blocks were seen, and fresh sums empty again there."""
        count, total, squares = np.array(self.fresh)
        enough = count >= ENOUGH
        safe = np.maximum(count, 1)
        mean = np.where(enough, total / safe, self.mean)
        square = np.where(enough, squares / safe, self.square)
        left = np.where(enough, 0.0, np.array(self.fresh))
        return Moments(tuple(mean.tolist()), tuple(square.tolist()), tuple(map(tuple, left.tolist())))

    def variance(self, schedule: Schedule, interval: Interval) -> float:
        """That of a batch's estimate, times its blocks, on `interval`; nan where a bin of it was not seen enough.

        On a clip of length T that covers a range r of rates a block counts w0 s T / r. The mean at a time t is that of
        s/p, which is nearly straight in p, over q(p(t)), which is known:

            (T / r)^2 mean over t of (E[(w0 s)^2 | t] - (E[s/p | t] / q(p(t)))^2)

        Where blocks are so long that the difference is a hundredth of its terms, and q steep (Gaussians), 20 bins give
        it to a factor of about two.
        """
        low, high = interval
        if low == high:
            single = torch.tensor([low], dtype=torch.float64)
            factor = float(schedule.density(schedule.rate(single)))
            at = min(int(low * TIME_BINS), TIME_BINS - 1)
            return _not_negative(self.square[at] * factor**2 - self.mean[at] ** 2)
        points = TIME_BINS * 200
        t = low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
        edges = schedule.rate(torch.tensor([low, high], dtype=torch.float64))
        factor = (high - low) / float(edges[1] - edges[0])
        bins = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        square = torch.tensor(self.square, dtype=torch.float64)[bins]
        p = schedule.rate(t)
        mean = self._mean_at(p, bins, schedule)
        return _not_negative(float((square - (mean / schedule.density(p)) ** 2).mean()) * factor**2)

    def _mean_at(self, p: Tensor, bins: Tensor, schedule: Schedule) -> Tensor:
        """E[s/p | p] at rates p in these bins: straight lines through the bins' means, nan for unseen bins."""
        means = np.array(self.mean)
        seen = np.flatnonzero(~np.isnan(means))
        if len(seen) < 2:
            return torch.from_numpy(means)[bins]
        centres = schedule.rate(torch.from_numpy((seen + 0.5) / TIME_BINS)).numpy()
        left = np.clip(np.searchsorted(centres, p.numpy()) - 1, 0, len(seen) - 2)
        slope = (means[seen[left + 1]] - means[seen[left]]) / (centres[left + 1] - centres[left])
        line = means[seen[left]] + slope * (p.numpy() - centres[left])
        return torch.from_numpy(np.where(np.isnan(means[bins.numpy()]), np.nan, line))

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's manifest; nan as null."""
        none = [[None if x != x else x for x in row] for row in (self.mean, self.square)]
        return {"mean": none[0], "square": none[1], "fresh": [list(row) for row in self.fresh]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Moments:
        """What `to_json` wrote."""
        mean, square = (tuple(float("nan") if x is None else x for x in value[key]) for key in ("mean", "square"))
        return cls(mean, square, tuple(map(tuple, value["fresh"])))


def _not_negative(variance: float) -> float:
    """A difference of two sampled moments may fall below 0; nan stays nan."""
    return 0.0 if variance < 0 else variance


def least(variances: dict[Interval, float]) -> Interval | None:
    """The interval of least variance; the first of equals; None where none is known."""
    known = {interval: value for interval, value in variances.items() if math.isfinite(value)}
    return min(known, key=lambda interval: known[interval]) if known else None
