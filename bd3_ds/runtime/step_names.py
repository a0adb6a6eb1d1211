"""Names of checkpoints and exports: step-00000300."""

from __future__ import annotations

import re

_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """The name of what was written after optimizer step `step`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a name that `step_name` gives; None for any other, such as a user's step-00000300-backup."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None
