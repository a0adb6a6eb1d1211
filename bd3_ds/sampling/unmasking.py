"""In which order the masks of a block fall. A rule is made anew for each block and serves all rows of a batch.

Under the log-linear schedule each mask has a time of its own, uniform in [0, 1], at which the reverse process, running
from time 1 to 0, takes it away, and the token comes from the network's prediction at that moment. So the random order
needs no discretised time: masks fall by their times, one after another (first hitting; Zheng et al. 2024). Ancestral
sampling with T steps lets those fall together whose times lie in the same T-th; where no mask falls, nothing changes
and the network need not be asked. With the same times and T large, the two write the same text.

The other rules look at the network's predictions of all masks first and take the surest. They are not the model's own
process: what is gained in tokens an evaluation is paid in the likeness of the text to the model's distribution.
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
class Outlook:
    """What the network said of the places it was asked about, each [N, S] fp64, 0 at all others; see `draw.Drawn`."""

    surest: Tensor
    entropy: Tensor
    log_mass: Tensor


class Rule(ABC):
    """times [N, S] fp64, uniform in [0, 1): when the mask at each place falls."""

    looks = True  # at what the network says of the asked places

    def __init__(self, times: Tensor):
        self.times = times

    @abstractmethod
    def ask(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The places that the network is asked about, boolean [N, S], none in finished rows; each row's time [N]."""

    def fall(self, asked: Tensor, outlook: Outlook) -> Tensor:
        """Which of the asked places are written: boolean [N, S]. After finitely many steps, all of them."""
        return asked


class FirstHitting(Rule):
    """One mask an evaluation, by its time."""

    looks = False

    def ask(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        t, first = self.times.where(masked, -1.0).max(1)
        at = torch.zeros_like(masked).scatter_(1, first[:, None], masked.any(1, keepdim=True))
        return at, t.clamp(min=0)


class Ancestral(Rule):
    """All masks of the next of T equal steps in which any falls; its time is the step's beginning."""

    looks = False

    def __init__(self, times: Tensor, steps: int):
        super().__init__(times)
        self.steps = steps
        self.step = (times * steps).floor()  # T - 1 … 0

    def ask(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        step = self.step.where(masked, -1.0)
        now = step.max(1).values
        return masked & (step == now[:, None]), (now + 1) / self.steps


class Analytic(Rule):
    """SEDD's own sampler (Lou et al. 2024): T steps of time, each mask falling at the rate that its scores sum to.

    From time t to s, with sigma = -log(1 - t), a mask falls with the probability (exp(sigma_t - sigma_s) - 1) times the
    sum of the scores p_t(y) / p_t([MASK]) over all tokens y, at most 1; at s = 0 all fall. One time a place decides all
    its steps: the mask falls once the probability that it still stands has sunk to the time.
    """

    def __init__(self, times: Tensor, steps: int, vocab_size: int):
        super().__init__(times)
        self.steps = self.left = steps
        self.vocab_size = vocab_size
        self.stands = torch.ones_like(times)

    def ask(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        return masked, torch.full_like(self.times[:, 0], self.left / self.steps)

    def fall(self, asked: Tensor, outlook: Outlook) -> Tensor:
        """See `Rule`."""
        left = torch.tensor([self.left, self.left - 1], dtype=torch.float64)
        now, then = sigma_of(left / self.steps)
        self.left -= 1
        if self.left == 0:
            return asked
        scores = (outlook.log_mass - torch.expm1(now).log() - math.log(self.vocab_size - 1)).exp()
        self.stands = self.stands * (1 - torch.expm1(now - then) * scores).clamp(min=0)
        return asked & (self.stands <= self.times)


class Surest(Rule):
    """Rules that ask about all masks; their time is the share of masks that stand."""

    def ask(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        return masked, masked.double().mean(1)


class Threshold(Surest):
    """All places whose likeliest token reaches a probability, and the surest place."""

    def __init__(self, times: Tensor, threshold: float):
        super().__init__(times)
        self.threshold = threshold

    def fall(self, asked: Tensor, outlook: Outlook) -> Tensor:
        """See `Rule`."""
        return asked & ((outlook.surest >= self.threshold) | (_rank(outlook.surest, asked) == 0))


class TokensPerStep(Surest):
    """The k surest places."""

    def __init__(self, times: Tensor, count: int):
        super().__init__(times)
        self.count = count

    def fall(self, asked: Tensor, outlook: Outlook) -> Tensor:
        """See `Rule`."""
        return asked & (_rank(outlook.surest, asked) < self.count)


class EntropyBound(Surest):
    """The places of least entropy as long as their entropies without the largest sum to at most a bound, in nats.

    That sum bounds what the tokens of a step can know of one another (Ben-Hamu et al. 2025).
    """

    def __init__(self, times: Tensor, bound: float):
        super().__init__(times)
        self.bound = bound

    def fall(self, asked: Tensor, outlook: Outlook) -> Tensor:
        """See `Rule`."""
        ordered, order = outlook.entropy.where(asked, torch.inf).sort(dim=1, stable=True)
        before = ordered.cumsum(1) - ordered  # of all places that are surer; nan behind the last asked one
        return asked & torch.zeros_like(asked).scatter_(1, order, before <= self.bound)


def make_rule(options: Options, times: Tensor, vocab_size: int) -> Rule:
    """The rule that the options name, for a block whose masks have these times [N, S]."""
    if options.steps is not None:
        return Analytic(times, options.steps, vocab_size) if options.analytic else Ancestral(times, options.steps)
    if options.threshold is not None:
        return Threshold(times, options.threshold)
    if options.entropy_bound is not None:
        return EntropyBound(times, options.entropy_bound)
    if options.tokens_per_step is not None:
        return TokensPerStep(times, options.tokens_per_step)
    return FirstHitting(times)


def _rank(surest: Tensor, asked: Tensor) -> Tensor:
    """0 for the surest asked place of each row, 1 for the next, …: [N, S]; the leftmost of equals comes first."""
    order = surest.where(asked, -1.0).sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
