"""The noise schedules that a recipe can name, with their parameters. A new one is an entry here.

No torch at the top: names and parameters are checked before it is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_ds.config.registries import SCHEDULES, ScheduleKind

if TYPE_CHECKING:
    from bd3_ds.diffusion.schedule import Schedule


def _log_linear() -> Schedule:
    from bd3_ds.diffusion import schedule

    return schedule.log_linear()


def _square() -> Schedule:
    from bd3_ds.diffusion import schedule

    return schedule.power(2.0)


def _square_root() -> Schedule:
    from bd3_ds.diffusion import schedule

    return schedule.power(0.5)


def _logarithmic() -> Schedule:
    from bd3_ds.diffusion import schedule

    return schedule.logarithmic()


def _cosine() -> Schedule:
    from bd3_ds.diffusion import schedule

    return schedule.cosine()


def _gaussian(mu: float, sigma: float) -> Schedule:
    from bd3_ds.diffusion import schedule

    return schedule.gaussian(mu, sigma)


def _bimodal(
    w1: float, mu1: float, sigma1: float, mu2: float, sigma2: float, mu2_end: float | None, progress: float
) -> Schedule:
    from bd3_ds.diffusion import schedule

    mu2 = mu2 if mu2_end is None else schedule.moved_mu2(mu2, mu2_end, progress)
    return schedule.mixture((w1, schedule.gaussian(mu1, sigma1)), (1 - w1, schedule.gaussian(mu2, sigma2)))


SCHEDULES.register("log_linear", ScheduleKind(_log_linear))
SCHEDULES.register("square", ScheduleKind(_square))
SCHEDULES.register("square_root", ScheduleKind(_square_root))
SCHEDULES.register("logarithmic", ScheduleKind(_logarithmic))
SCHEDULES.register("cosine", ScheduleKind(_cosine))
# The parameters of these two have sections of their own in the schema.
SCHEDULES.register("gaussian", ScheduleKind(_gaussian))
SCHEDULES.register("bimodal", ScheduleKind(_bimodal, moves=True))
