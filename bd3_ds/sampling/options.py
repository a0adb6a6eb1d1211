"""The options of a sampler and their checks, and the plan of its windows; no torch here, so that checks are quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.runtime.errors import UserError, did_you_mean

EOS, ENTROPY = "eos", "entropy"
STOPS = (EOS, ENTROPY)
POLICIES = ("steps", "threshold", "entropy_bound", "tokens_per_step")


@dataclass(frozen=True)
class Options:
    """How tokens are sampled, the unmasking policy, and when a text ends.

    The unmasking policy, one of
      (none of the below)  first hitting: one token per evaluation, in a random order (Zheng et al. 2024)
      steps                ancestral: T equal steps of time, each removes all masks whose time lies in it
      steps, analytic      SEDD's own: rates from the network's scores (Lou et al. 2024)
      threshold            all positions whose likeliest token has at least this probability, and the most confident
      entropy_bound        the most confident positions as long as their entropies, the largest left out, sum to at
                           most this, in nats (Ben-Hamu et al. 2025)
      tokens_per_step      so many of the most confident positions per evaluation
    temperature divides logits (0: the likeliest token); top_k and nucleus keep the likeliest tokens; repetition_penalty
    divides the probability of tokens that are among the last 256. stop: of "eos" (the first end of text) and
    "entropy" (the last 256 tokens below 4 nats; these are cut off). window: the context length,
    overlap: the tokens of it that the next window keeps; None: the length that the model was trained with, and half.
    """

    steps: int | None = None
    analytic: bool = False
    threshold: float | None = None
    entropy_bound: float | None = None
    tokens_per_step: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    nucleus: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    window: int | None = None
    overlap: int | None = None

    def check(self, objective: str) -> None:
        """Raise UserError for the first value that cannot be, or does not go with the objective."""
        chosen = [name for name in POLICIES if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise UserError(
                f"{chosen[0]}={getattr(self, chosen[0])} and {chosen[1]}={getattr(self, chosen[1])} are two orders of "
                "unmasking; give one"
            )
        facts = OBJECTIVES[objective]
        if facts.causal and chosen:
            raise UserError(
                f"{chosen[0]} is for diffusion; this model is {objective} and writes one token an evaluation"
            )
        if self.analytic and (not facts.analytic or self.steps is None):
            raise UserError("analytic is SEDD's sampler and goes with steps, such as steps=128")
        for name in ("steps", "tokens_per_step", "top_k"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name}={value} must be a whole number above 0")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"threshold={self.threshold} must lie in (0, 1], such as 0.9")
        if self.entropy_bound is not None and not 0 <= self.entropy_bound < math.inf:
            raise UserError(f"entropy_bound={self.entropy_bound} must be 0 nats or more, such as 0.1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0 (the most likely token) or more, such as 1.0")
        if self.nucleus is not None and not 0 < self.nucleus <= 1:
            raise UserError(f"nucleus={self.nucleus} must lie in (0, 1], such as 0.9")
        if not 1 <= self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be 1 (none) or more, such as 1.2")
        for name in self.stop:
            if name not in STOPS:
                raise UserError(f"stop={name} is unknown; {did_you_mean(name, STOPS)}")

    @property
    def shapes_tokens(self) -> bool:
        """Whether tokens are sampled from a distribution other than the model's own."""
        return (self.temperature, self.top_k, self.nucleus, self.repetition_penalty) != (1, None, None, 1)

    def as_record(self) -> dict[str, object]:
        """Every field that is not at its default, for records."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class WindowPlan:
    """How `length` tokens are divided: blocks of `block` tokens in sliding windows of `window`.

    When a window is full, the next one begins with its last `overlap` tokens, at position 0. `whole`: one block is the
    window (MDLM, SEDD), and the overlap's tokens are given ones inside it; else they are its clean prefix.
    """

    length: int
    block: int
    window: int
    overlap: int
    whole: bool = False


def plan_windows(length: int, block: int, trained: int, options: Options, positions: int | None = None) -> WindowPlan:
    """The plan for a model of this block size trained on `trained` tokens; `positions`: how many it has learned, if it
    learns them. Raises UserError for a length, window or overlap that cannot be.
    """
    window = trained if options.window is None else options.window
    if length < 1:
        raise UserError(f"length={length} must be at least 1")
    if window < 2:
        raise UserError(f"window={window} must be at least 2")
    if positions is not None and window > positions:
        raise UserError(f"window={window} is more than the {positions} positions that the model has learned")
    whole = block == trained
    grid = 1 if whole else block  # what window and overlap must be multiples of
    if window % grid:
        raise UserError(f"window={window} must be a multiple of the block size {block}")
    overlap = window // 2 // grid * grid if options.overlap is None else options.overlap
    if window > grid and (overlap % grid or not 0 < overlap <= window - grid):
        multiple = f"be a multiple of the block size {grid}" if grid > 1 else "lie"
        raise UserError(f"overlap={overlap} must {multiple} in {grid} … {window - grid}")
    return WindowPlan(length, min(window, length) if whole else block, window, overlap, whole)
