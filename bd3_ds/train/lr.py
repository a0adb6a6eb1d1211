"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from bd3_ds.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """For the update that follows `step` done ones: linear warm-up, then lr, then down to min_lr at `total_steps`.

    It falls in the last optim.decay_share of the steps after warm-up, as half a cosine or linearly; a share below 1
    gives the schedule that is called warm-up, stable, decay (WSD; Hu et al. 2024, MiniCPM).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.decay == "constant":
        return optim.lr
    steps = optim.decay_share * max(1, total_steps - optim.warmup_steps)
    progress = min(1.0, max(0.0, 1 - (total_steps - step) / steps))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if optim.decay == "cosine" else 1 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * left
