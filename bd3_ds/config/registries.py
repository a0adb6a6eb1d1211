"""What a recipe chooses by name under `objective`, and what is to be known of each before torch is imported.

The entries are registered where they are computed: `diffusion/objectives/`, `diffusion/schedules.py` and
`diffusion/weighting.py`, or in a module of the user's (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bd3_ds.runtime.registry import Registry

ESTIMATORS = ("exact", "stratified", "mc", "report")
TOKEN, SEQUENCE, CONFIGURED = "token", "sequence", "configured"  # kinds of blocks


@dataclass(frozen=True)
class Objective:
    """A training objective: its loss, and the facts by which all else treats its models.

    title: what a model of it is, for its card. loss: from a denoiser and a noisy micro-batch to a `Loss`, called as
    `diffusion/objective.py` says. causal: tokens see those before them alone, there is no noise, every token is asked
    for. timed: the network is conditioned on the noise level of a sequence. blocks: which tokens are denoised together:
    each alone, those of a whole sequence, or as many as objective.block_size says. estimators: those that can score a
    model of it. analytic: its network's outputs are rates of the reverse process, so that sampling can go by them.
    """

    title: str
    loss: Callable[..., Any]
    causal: bool = False
    timed: bool = False
    blocks: str = SEQUENCE
    estimators: tuple[str, ...] = ESTIMATORS
    analytic: bool = False

    @property
    def has_blocks(self) -> bool:
        """Whether objective.block_size, block_schedule and views belong to it: blocks that share a clean pass."""
        return self.blocks == CONFIGURED

    @property
    def is_whole(self) -> bool:
        """Whether a sequence of whatever length is one block."""
        return self.blocks == SEQUENCE

    @property
    def sampled_estimator(self) -> str:
        """What scores it where an exact value is out of reach."""
        return "stratified" if "stratified" in self.estimators else self.estimators[0]

    @property
    def can_be_exact(self) -> bool:
        """Whether small blocks of it can be scored without drawing anything."""
        return "exact" in self.estimators

    def block_size(self, configured: int | None, length: int) -> int:
        """L', the tokens denoised together in sequences of `length`; `configured` is objective.block_size."""
        if self.blocks == TOKEN:
            return 1
        return (configured or length) if self.has_blocks else length


OBJECTIVES: Registry[Objective] = Registry("objective.name", "bd3_ds.diffusion.objectives")
