"""Which bound scores the models of an objective, by the name that the objective's entry gives; the bound itself is
computed in `likelihood.py` and `score_entropy_bound.py`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bd3_ds.config.registries import BOUNDS, MASKED, OBJECTIVES
from bd3_ds.diffusion import likelihood
from bd3_ds.diffusion.chunked_head import HeadLoss
from bd3_ds.diffusion.likelihood import Bound, Estimator, Texts, ViewDenoiser
from bd3_ds.diffusion.score_entropy_bound import score_entropy_bound


class Answer(Protocol):
    """What `read` makes of the head at N places `at` of the flattened tokens.

    tokens: [n, L], or [b, K, L], K noisy views of each text that was given. sigma: [n] the noise level of each, None
    where the network is told none.
    """

    def __call__(self, tokens: Tensor, sigma: Tensor | None, at: Tensor, read: HeadLoss) -> tuple[Tensor, Tensor]: ...


class ScoredNetwork(Protocol):
    """A network to be scored: an Answer that is given the clean texts x0 [b, L], for noisy views of them, or None."""

    def __call__(self, x0: Tensor | None) -> Answer: ...


def bound_under(
    objective: str, network: ScoredNetwork, texts: Texts, block_size: int, mask_id: int, estimator: Estimator
) -> Bound:
    """The Bound of texts by a network of this objective; `estimator` is one that can score it.

    block_size: tokens that are denoised together. Sampled estimators draw by (seed, number of the row).
    """
    found: Bound = BOUNDS[OBJECTIVES[objective].bound](network, texts, block_size, mask_id, estimator)
    return found


@BOUNDS.registered("autoregressive")
def _autoregressive(
    network: ScoredNetwork, texts: Texts, _block_size: int, mask_id: int, _estimator: Estimator
) -> Bound:
    """The likelihood itself: every token from those before it."""
    answer = network(None)
    return likelihood.autoregressive(lambda x0, at, read: answer(x0, None, at, read), texts, mask_id)


@BOUNDS.registered("score entropy")
def _score_entropy(network: ScoredNetwork, texts: Texts, _block_size: int, mask_id: int, estimator: Estimator) -> Bound:
    """The integral over time of the score entropy of a network that is told the noise level."""
    return score_entropy_bound(network(None), texts, mask_id, estimator.views, estimator.seed)


@BOUNDS.registered(MASKED)
def _masked(network: ScoredNetwork, texts: Texts, block_size: int, mask_id: int, estimator: Estimator) -> Bound:
    """The cross-entropy of masked tokens, block after block, each beside the clean ones before it."""

    def condition(x0: Tensor) -> ViewDenoiser:
        answer = network(x0)
        return lambda x_t, at, read: answer(x_t, None, at, read)

    if estimator.name == "exact":
        return likelihood.exact(condition, texts, block_size, mask_id, estimator.at_once)
    sampled = likelihood.monte_carlo if estimator.name == "mc" else likelihood.stratified
    return sampled(condition, texts, block_size, mask_id, estimator.views, estimator.seed)
