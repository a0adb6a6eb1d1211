"""Noise schedules as proposals: which masking rates training draws, and the weight that keeps the bound unbiased.

A schedule maps t ~ U[t_min, t_max] to a masking rate p in (0, 1]. With q the density of p that this induces,
the weight is w = 1 / (p q(p)) and E_p[w * sum of masked losses] is the NELBO over the rates drawn (docs: MATH.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bd3_ds.config.schema import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """A monotone schedule: `rate` is p(t), `log_slope` is p'(t) / p(t)."""

    t_min: float
    t_max: float
    rate: Callable[[Tensor], Tensor]
    log_slope: Callable[[Tensor], Tensor]

    def place(self, u: Tensor) -> Tensor:
        """t for u in [0, 1)."""
        return self.t_min + (self.t_max - self.t_min) * u

    def weight(self, t: Tensor) -> Tensor:
        """1 / (p q(p)) at t, with q the density of p when t is uniform on [t_min, t_max]."""
        return (self.t_max - self.t_min) * self.log_slope(t)


_SHAPES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "log_linear": (lambda t: t, lambda t: 1 / t),
}


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that a checked configuration names."""
    rate, log_slope = _SHAPES[config.name]
    return Schedule(config.t_min, config.t_max, rate, log_slope)
