"""Which interval of times to train on: the one whose estimate of the bound varies least (paper, section 5.3).

Two ways to know an interval's variance:
  grid     a forward pass of every candidate on held-out batches, as in the paper (`candidates`, `Spread`)
  moments  none at all: training batches leave moments of a block's loss by its masking rate (`Moments`), from which the
           variance under any interval is a weighted sum

The variance is that of a block's estimate, in (nats per token)^2; a batch's is this over the number of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bd3_ds.config.schema import ClipSearchConfig, ScheduleConfig
from bd3_ds.diffusion.proposal import Interval, Proposal, make_proposal

GRID = 0.05
RATE_BINS = 20  # bins of `Moments`, as wide as the grid
ENOUGH = 16  # blocks that a bin must have seen to count
SINGLE: Interval = (1.0, 1.0)


def candidates(
    search: ClipSearchConfig, schedule: ScheduleConfig, block_size: int, progress: float = 0.0
) -> list[Interval]:
    """The configured interval, then each width at each place of a 0.05 grid, as far as sampling's start stays covered.

    Sampling starts from a block of masks alone. An interval counts if the proposal shows such a block at least
    `min_coverage` times as often as unclipped log-linear time would, 1 / (L' + 1). With block size 1 the one other
    candidate is the rate 1, at which the bound is the likelihood.
    """
    whole = (schedule.t_min, schedule.t_max)
    if block_size == 1:
        return [whole, SINGLE] if schedule.defensive == 0 else [whole]
    found = [whole]
    for width in search.widths:
        for place in range(round((1 - width) / GRID) + 1):
            interval = (max(round(place * GRID, 6), schedule.t_min), min(round(place * GRID + width, 6), 1.0))
            share = make_proposal(schedule, progress, interval).all_masked_share(block_size)
            if share >= search.min_coverage / (block_size + 1) and interval not in found:
                found.append(interval)
    return found


def maskable(blocks: int, block_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Tokens [B] of each block that can be masked: all, but for the first block's given token."""
    count = torch.full((blocks,), block_size, dtype=torch.float64, device=device)
    count[0] -= 1
    return count


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
        """Unbiased; nan for fewer than two numbers."""
        if self.count < 2:
            return float("nan")
        return max(0.0, self.squares - self.total**2 / self.count) / (self.count - 1)


def spread_sums(block_nats: Tensor, weight: Tensor) -> Tensor:
    """[3] for `Spread` of the blocks' estimates weight * nats, with the proposal's weight [b, B].

    block_nats [b, B] are nats per maskable token, nan where a block has none.
    """
    known = ~block_nats.isnan()
    estimate = torch.where(known, weight * block_nats, 0.0)
    return torch.stack([known.double().sum(), estimate.sum(), estimate.square().sum()])


def moment_sums(block_nats: Tensor, rate: Tensor) -> Tensor:
    """[3, RATE_BINS]: blocks, sums of nats / rate and of nats^2 / rate, by the block's rate; arguments as above.

    Both are of order 1 down to rate 0 (a block of L' tokens has nats^2 of order rate / L' there), so that their means
    stand for a whole bin.
    """
    known = ~block_nats.isnan() & (rate > 0)
    # No indexing by `known`, for which a GPU's host would have to wait.
    nats, p = torch.where(known, block_nats, 0.0).flatten(), torch.where(known, rate, 1.0).flatten()
    index = (p * RATE_BINS).long().clamp(max=RATE_BINS - 1)
    sums = torch.zeros(3, RATE_BINS, dtype=torch.float64, device=p.device)
    return sums.index_add_(1, index, torch.stack([known.flatten().double(), nats / p, nats.square() / p]))


@dataclass(frozen=True)
class Moments:
    """What training has seen of a block size: per bin of rates the means that `moment_sums` sums, and `fresh`.

    Sums since the last search replace a bin's means once there are ENOUGH blocks; until then a bin keeps its last ones.
    The exploring share of the blocks sees to it that every bin gets there.
    """

    mean: tuple[float, ...] = (float("nan"),) * RATE_BINS
    square: tuple[float, ...] = (float("nan"),) * RATE_BINS
    fresh: tuple[tuple[float, ...], ...] = ((0.0,) * RATE_BINS,) * 3

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

    def variance(self, proposal: Proposal) -> float:
        """Variance of a block's estimate under `proposal`; nan where a bin that it draws from was never seen.

        A block of loss s (nats per maskable token) at rate p gives w(p) s = s / (p q(p) r), r the covered range, so
        E[(w s)^2] = integral of E[s^2/p | p] / (p q r^2) and E[w s] = integral of E[s/p | p] / r over the range.
        """
        if proposal.schedule is None:  # one rate, that of the last bin: w s = s / p
            return _not_negative(self.square[-1] - self.mean[-1] ** 2)
        reach = proposal.highest - proposal.lowest
        points = 500  # per bin; midpoints, so that the ends of a bin are not asked for
        p = (torch.arange(RATE_BINS * points, dtype=torch.float64) + 0.5) / (RATE_BINS * points)
        density = proposal.schedule.density(p)
        inside = ((p >= proposal.lowest) & (p <= proposal.highest)).numpy()
        drawn = inside & (density > 1e-6).numpy()
        over = np.where(drawn, 1 / (p * density.clamp(min=1e-6)).numpy(), 0.0).reshape(RATE_BINS, points).mean(1)
        part = drawn.reshape(RATE_BINS, points).mean(1)
        used = part > 0
        square, mean = np.array(self.square)[used], np.array(self.mean)[used]
        second = float((square * over[used]).sum() / RATE_BINS) / reach**2
        first = float((mean * part[used]).sum() / RATE_BINS) / reach
        return _not_negative(second - first**2)

    def to_json(self) -> dict[str, list[float | None] | list[list[float]]]:
        """For a checkpoint's manifest; nan as null."""
        none = [[None if x != x else x for x in row] for row in (self.mean, self.square)]
        return {"mean": none[0], "square": none[1], "fresh": [list(row) for row in self.fresh]}

    @classmethod
    def from_json(cls, value: dict[str, list[float | None] | list[list[float]]]) -> Moments:
        """What `to_json` wrote."""
        mean, square = (tuple(float("nan") if x is None else x for x in value[key]) for key in ("mean", "square"))
        return cls(mean, square, tuple(map(tuple, value["fresh"])))  # type: ignore[arg-type]


def _not_negative(variance: float) -> float:
    """A difference of two sampled moments may fall below 0; nan stays nan."""
    return 0.0 if variance < 0 else variance


def least(variances: dict[Interval, float]) -> Interval | None:
    """The interval of least variance; the first of equals; None where none is known."""
    known = {interval: value for interval, value in variances.items() if value == value}
    return min(known, key=lambda interval: known[interval]) if known else None
