"""Noise schedules: distributions of the masking rate p on (0, 1], each given by its quantile function p(t).

A schedule draws p = p(t) for uniform t, so its density is q(p) = 1 / p'(t). `restricted` keeps a part [t_min, t_max] of
the times (the paper's clipping), `mixture` mixes schedules. All tensors are fp64 on the CPU: rates are drawn there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

COSINE_EPS = 1e-3  # the smallest rate of the cosine schedule, as in the paper's code
MU2_SPEED = 3.0  # the report's code moves mu2 by 1 - exp(-3 progress) of the way


@dataclass(frozen=True)
class Schedule:
    """rate: p(t), rising from `lowest` to `highest` over t in [0, 1]. time: its inverse, the CDF. density: q(p)."""

    rate: Function
    time: Function
    density: Function
    lowest: float = 0.0
    highest: float = 1.0


def log_linear() -> Schedule:
    """p = t."""
    return Schedule(lambda t: t, lambda p: p, torch.ones_like)


def power(exponent: float) -> Schedule:
    """p = t^a: `square` for a = 2, `square_root` for a = 1/2."""
    return Schedule(lambda t: t**exponent, lambda p: p ** (1 / exponent), lambda p: p ** (1 / exponent - 1) / exponent)


def logarithmic() -> Schedule:
    """p = log(1 + t) / log 2."""
    log2 = math.log(2)
    return Schedule(lambda t: t.log1p() / log2, lambda p: torch.expm1(p * log2), lambda p: log2 * torch.exp(p * log2))


def cosine() -> Schedule:
    """p = 1 - (1 - eps) cos(pi t / 2)."""
    scale = 1 - COSINE_EPS

    def density(p: Tensor) -> Tensor:
        inside = p >= COSINE_EPS
        root = (scale**2 - (1 - p) ** 2).clamp(min=0).sqrt()
        return torch.where(inside, 2 / math.pi / root, 0.0)

    return Schedule(
        rate=lambda t: 1 - scale * torch.cos(math.pi / 2 * t),
        time=lambda p: 2 / math.pi * torch.arccos(((1 - p) / scale).clamp(max=1)),
        density=density,
        lowest=COSINE_EPS,
    )


def gaussian(mu: float, sigma: float) -> Schedule:
    """Normal(mu, sigma) truncated to (0, 1)."""
    below, above = (torch.special.ndtr(torch.tensor(z / sigma, dtype=torch.float64)) for z in (-mu, mu - 1))
    inside = 1 - below - above

    def rate(t: Tensor) -> Tensor:
        # Each half by its own tail: ndtri near 1 would lose the digits that ndtri near 0 has.
        left = torch.special.ndtri(below + t * inside)
        right = -torch.special.ndtri(above + (1 - t) * inside)
        return (mu + sigma * torch.where(t < 0.5, left, right)).clamp(0, 1)

    def density(p: Tensor) -> Tensor:
        z = (p - mu) / sigma
        return torch.exp(-0.5 * z**2) / (math.sqrt(2 * math.pi) * sigma * inside)

    return Schedule(rate, lambda p: ((torch.special.ndtr((p - mu) / sigma) - below) / inside).clamp(0, 1), density)


def moved_mu2(start: float, end: float, progress: float) -> float:
    """The second mean of the bimodal schedule after a share `progress` of the training, as the report's code has it."""
    return start + (end - start) * (1 - math.exp(-MU2_SPEED * progress))


def restricted(schedule: Schedule, t_min: float, t_max: float) -> Schedule:
    """The schedule restricted to t ~ U[t_min, t_max], t_min < t_max."""
    width = t_max - t_min
    lowest, highest = (float(schedule.rate(torch.tensor(t, dtype=torch.float64))) for t in (t_min, t_max))

    def density(p: Tensor) -> Tensor:
        inside = (p >= lowest) & (p <= highest)
        return torch.where(inside, schedule.density(p) / width, 0.0)

    return Schedule(
        rate=lambda t: schedule.rate(t_min + width * t),
        time=lambda p: ((schedule.time(p) - t_min) / width).clamp(0, 1),
        density=density,
        lowest=lowest,
        highest=highest,
    )


def mixture(*parts: tuple[float, Schedule]) -> Schedule:
    """p from part i with probability share_i, which add up to 1. One t orders all rates, so strata stay strata."""

    def total(functions: Sequence[tuple[float, Function]]) -> Function:
        return lambda p: sum((share * f(p) for share, f in functions), torch.zeros_like(p))

    time = total([(share, part.time) for share, part in parts])
    density = total([(share, part.density) for share, part in parts])
    lowest, highest = min(part.lowest for _, part in parts), max(part.highest for _, part in parts)
    return Schedule(lambda t: _inverse(time, density, t, lowest, highest), time, density, lowest, highest)


def _inverse(time: Function, density: Function, t: Tensor, lowest: float, highest: float) -> Tensor:
    """p with time(p) = t: a table gives a bracket, Newton's steps that stay in it the digits."""
    grid = torch.linspace(lowest, highest, 1025, dtype=torch.float64)
    above = torch.searchsorted(time(grid), t.contiguous()).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    p = (low + high) / 2
    for _ in range(50):
        error = time(p) - t
        low, high = torch.where(error < 0, p, low), torch.where(error < 0, high, p)
        newton = p - error / density(p)
        moved = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        if float((moved - p).abs().max()) < 1e-14:
            break
        p = moved
    return p
