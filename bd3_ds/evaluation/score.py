"""The result of `LanguageModel.score`: the NELBO of texts, by token, by text and in total."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """The one bound, in nats; for AR and block size 1 it is the negative log-likelihood itself.

    nelbo [B, L] fp64 by token, 0 where it is not scored (position 0 is given); a block's bound is spread over its
    scored tokens, so only sums over whole blocks have meaning. stderr [B]: what the estimator adds to each row's sum, 0
    when exact, nan for a single noisy view, which gives no estimate of its error. forwards: passes of the network over
    a sequence. tokens: scored ones, by_row [B]: those of each row. estimator: exact, stratified or mc, or several where
    texts were scored by several.
    """

    nelbo: Tensor
    stderr: Tensor
    forwards: int
    tokens: int
    by_row: Tensor
    estimator: str

    @property
    def nats(self) -> Tensor:
        """The bound of each row, fp64 [B] nats, the sum over its tokens."""
        return self.nelbo.sum(1)

    @property
    def ppl(self) -> Tensor:
        """The perplexity of each row, fp64 [B]: exp of its nats a scored token; nan where it has none."""
        return (self.nats / self.by_row).exp()

    @property
    def ppl_stderr(self) -> Tensor:
        """The standard error of `ppl`, fp64 [B], to first order."""
        return self.ppl * self.stderr / self.by_row

    @property
    def perplexity(self) -> float:
        """Of all rows together: exp of all nats over all scored tokens."""
        return math.exp(min(700.0, float(self.nats.sum()) / self.tokens))
