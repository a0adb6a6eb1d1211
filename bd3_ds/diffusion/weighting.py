"""Weights of the training loss beside the bound's own (Shi & Titsias 2025), as functions of the log-SNR.

    loss = integral w(lambda) (1/p) E[sum of masked losses] dp,    lambda = log(alpha / (1 - alpha)),  alpha = 1 - p

Any of them goes with any proposal. What is trained with one is still scored by the bound.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bd3_ds.config.registries import WEIGHTS, Weight
from bd3_ds.config.schema import WeightConfig

if TYPE_CHECKING:
    from torch import Tensor

EDM_MEAN, EDM_STD, EDM_DATA = 2.4, 2.4, 0.5
P_MAX = 1 - 1e-6  # lambda is taken at most here: EDM and FM divide by alpha


def edm(log_snr: Tensor) -> Tensor:
    """N(lambda; 2.4, 2.4^2) (exp(-lambda) + 0.5^2) / 0.5^2."""
    z = (log_snr - EDM_MEAN) / EDM_STD
    normal = (-0.5 * z**2).exp() / (EDM_STD * math.sqrt(2 * math.pi))
    return normal * ((-log_snr).exp() + EDM_DATA**2) / EDM_DATA**2


def iddpm(log_snr: Tensor) -> Tensor:
    """sech(lambda / 2) = 2 sqrt(alpha (1 - alpha))."""
    return 1 / (log_snr / 2).cosh()


def sigmoid(log_snr: Tensor, k: float) -> Tensor:
    """sigmoid(k - lambda); for k = 0 it is p."""
    return (k - log_snr).sigmoid()


def flow_matching(log_snr: Tensor) -> Tensor:
    """exp(-lambda / 2) = sqrt(p / alpha)."""
    return (-log_snr / 2).exp()


def log_snr_of(p: Tensor) -> Tensor:
    """lambda = log((1 - p) / p) at masking rate p."""
    return -p.double().clamp(max=P_MAX).logit()


def loss_weight(config: WeightConfig, p: Tensor, bound_weight: Tensor) -> Tensor:
    """What a masked token counts in the loss, from the block's rate p and its weight in the bound.

    `simple` is 1 under every proposal: plain cross-entropy on masked tokens.
    """
    weight = WEIGHTS[config.name]
    if weight.plain:
        return bound_weight.new_ones(bound_weight.shape)
    factor: Tensor = weight.function(log_snr_of(p), config)
    return factor * bound_weight


WEIGHTS.register("elbo", Weight(lambda log_snr, _: log_snr.new_ones(log_snr.shape), single_rate=True))
WEIGHTS.register("edm", Weight(lambda log_snr, _: edm(log_snr)))
WEIGHTS.register("iddpm", Weight(lambda log_snr, _: iddpm(log_snr)))
WEIGHTS.register("sigmoid", Weight(lambda log_snr, config: sigmoid(log_snr, config.sigmoid_k)))
WEIGHTS.register("fm", Weight(lambda log_snr, _: flow_matching(log_snr)))
WEIGHTS.register("simple", Weight(lambda log_snr, _: log_snr.new_ones(log_snr.shape), plain=True, single_rate=True))
