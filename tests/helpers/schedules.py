"""Schedule configurations for tests, from the defaults of configs/base.yaml."""

from __future__ import annotations

import dataclasses
from typing import Any

from bd3_ds.config.load import load_defaults
from bd3_ds.config.schema import ScheduleConfig


def schedule_config(
    gaussian: dict[str, float] | None = None, bimodal: dict[str, float] | None = None, **changes: Any
) -> ScheduleConfig:
    """The default schedule section with `changes`; those of its two subsections as dictionaries."""
    schedule = load_defaults({"run_dir": "x", "data.train": "x"}, "a test").objective.schedule
    return dataclasses.replace(
        schedule,
        gaussian=dataclasses.replace(schedule.gaussian, **(gaussian or {})),
        bimodal=dataclasses.replace(schedule.bimodal, **(bimodal or {})),
        **changes,
    )
