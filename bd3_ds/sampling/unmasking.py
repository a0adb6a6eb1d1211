"""Unmasking policies: which masked positions of a block each step reveals.

A policy is made for each block and serves all rows of a batch.

Under the log-linear schedule each mask has a time of its own, uniform in [0, 1], at which the reverse process, running
from time 1 to 0, removes it, and the token comes from the network's prediction at that moment. So the random order
needs no discretised time: masks are removed by their times, one after another (first hitting; Zheng et al. 2024).
Ancestral sampling with T steps removes together those whose times lie in the same T-th; a step that removes none
changes nothing and needs no evaluation. With the same times and T large, the two write the same text.

The confidence policies evaluate all masks first and reveal the most confident. They are not the model's own reverse
process: more tokens per evaluation, at the price of a distribution that differs from the model's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_ds.diffusion.score_entropy import sigma_of
from bd3_ds.sampling.options import Options


@dataclass(frozen=True)
class Predictions:
    """The network's predictions at the candidate positions, each [N, S] fp64, 0 elsewhere; see `draw.SampledTokens`."""

    confidence: Tensor
    entropy: Tensor
    log_mass: Tensor


class UnmaskingPolicy(ABC):
    """times [N, S] fp64, uniform in [0, 1): when the reverse process removes the mask at each position."""

    needs_predictions = True  # whether `reveal` reads them

    def __init__(self, times: Tensor):
        self.times = times

    @abstractmethod
    def candidates(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Positions to evaluate in this step, boolean [N, S], none in finished rows; each row's time [N]."""

    def reveal(self, candidates: Tensor, predictions: Predictions) -> Tensor:
        """Which of the candidates are written: boolean [N, S]. After finitely many steps, all of them."""
        return candidates


class FirstHitting(UnmaskingPolicy):
    """One mask per evaluation, by its time."""

    needs_predictions = False

    def candidates(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnmaskingPolicy`."""
        t, first = self.times.where(masked, -1.0).max(1)
        at = torch.zeros_like(masked).scatter_(1, first[:, None], masked.any(1, keepdim=True))
        return at, t.clamp(min=0)


class Ancestral(UnmaskingPolicy):
    """All masks of the next of T equal steps that removes any; its time is the step's beginning."""

    needs_predictions = False

    def __init__(self, times: Tensor, steps: int):
        super().__init__(times)
        self.steps = steps
        self.step = (times * steps).floor()  # T - 1 … 0

    def candidates(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnmaskingPolicy`."""
        step = self.step.where(masked, -1.0)
        now = step.max(1).values
        return masked & (step == now[:, None]), (now + 1) / self.steps


class Analytic(UnmaskingPolicy):
    """SEDD's own sampler (Lou et al. 2024): T steps of time, each mask removed at the rate that its scores sum to.

    From time t to s, with sigma = -log(1 - t), a mask is removed with the probability (exp(sigma_t - sigma_s) - 1)
    times the sum of the scores p_t(y) / p_t([MASK]) over all tokens y, at most 1; at s = 0 all are. A position's one
    time decides all its steps: its mask is removed once the probability that it is still there has sunk to the time.
    """

    def __init__(self, times: Tensor, steps: int, vocab_size: int):
        super().__init__(times)
        self.steps = self.steps_left = steps
        self.vocab_size = vocab_size
        self.survival = torch.ones_like(times)  # probability that the mask is still there

    def candidates(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnmaskingPolicy`."""
        return masked, torch.full_like(self.times[:, 0], self.steps_left / self.steps)

    def reveal(self, candidates: Tensor, predictions: Predictions) -> Tensor:
        """See `UnmaskingPolicy`."""
        left = torch.tensor([self.steps_left, self.steps_left - 1], dtype=torch.float64)
        now, then = sigma_of(left / self.steps)
        self.steps_left -= 1
        if self.steps_left == 0:
            return candidates
        scores = (predictions.log_mass - torch.expm1(now).log() - math.log(self.vocab_size - 1)).exp()
        self.survival = self.survival * (1 - torch.expm1(now - then) * scores).clamp(min=0)
        return candidates & (self.survival <= self.times)


class ConfidencePolicy(UnmaskingPolicy):
    """Policies that evaluate all masks and reveal the most confident; time is the share of masks that are left."""

    def candidates(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnmaskingPolicy`."""
        return masked, masked.double().mean(1)


class Threshold(ConfidencePolicy):
    """All positions whose likeliest token reaches a probability, and the most confident one."""

    def __init__(self, times: Tensor, threshold: float):
        super().__init__(times)
        self.threshold = threshold

    def reveal(self, candidates: Tensor, predictions: Predictions) -> Tensor:
        """See `UnmaskingPolicy`."""
        return candidates & (
            (predictions.confidence >= self.threshold) | (_rank(predictions.confidence, candidates) == 0)
        )


class TokensPerStep(ConfidencePolicy):
    """The k most confident positions."""

    def __init__(self, times: Tensor, count: int):
        super().__init__(times)
        self.count = count

    def reveal(self, candidates: Tensor, predictions: Predictions) -> Tensor:
        """See `UnmaskingPolicy`."""
        return candidates & (_rank(predictions.confidence, candidates) < self.count)


class EntropyBound(ConfidencePolicy):
    """The positions of least entropy as long as their entropies without the largest sum to at most a bound, in nats.

    That sum bounds the mutual information of the tokens of a step (Ben-Hamu et al. 2025).
    """

    def __init__(self, times: Tensor, bound: float):
        super().__init__(times)
        self.bound = bound

    def reveal(self, candidates: Tensor, predictions: Predictions) -> Tensor:
        """See `UnmaskingPolicy`."""
        ordered, order = predictions.entropy.where(candidates, torch.inf).sort(dim=1, stable=True)
        before = ordered.cumsum(1) - ordered  # of all more confident positions; nan after the last candidate
        return candidates & torch.zeros_like(candidates).scatter_(1, order, before <= self.bound)


def make_policy(options: Options, times: Tensor, vocab_size: int) -> UnmaskingPolicy:
    """The policy that the options name, for a block whose masks have these times [N, S]."""
    if options.steps is not None:
        return Analytic(times, options.steps, vocab_size) if options.analytic else Ancestral(times, options.steps)
    if options.threshold is not None:
        return Threshold(times, options.threshold)
    if options.entropy_bound is not None:
        return EntropyBound(times, options.entropy_bound)
    if options.tokens_per_step is not None:
        return TokensPerStep(times, options.tokens_per_step)
    return FirstHitting(times)


def _rank(confidence: Tensor, candidates: Tensor) -> Tensor:
    """0 for the most confident candidate of each row, 1 for the next, …: [N, S]; the leftmost of equals comes first."""
    order = confidence.where(candidates, -1.0).sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
