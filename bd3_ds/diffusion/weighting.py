"""Weights of the training loss beside the bound's own (Shi & Titsias 2025), as functions of the log-SNR.

    loss = integral w(lambda) (1/p) E[sum of masked losses] dp,    lambda = log(alpha / (1 - alpha)),  alpha = 1 - p

Any of them goes with any proposal. What is trained with one is still scored by the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bd3_ds.config.schema import WeightConfig

EDM_MEAN, EDM_STD, EDM_DATA = 2.4, 2.4, 0.5
P_MAX = 1 - 1e-6  # lambda is taken at most here: EDM and FM divide by alpha


def edm(log_snr: Tensor) -> Tensor:
    """N(lambda; 2.4, 2.4^2) (exp(-lambda) + 0.5^2) / 0.5^2."""
    z = (log_snr - EDM_MEAN) / EDM_STD
    normal = torch.exp(-0.5 * z**2) / (EDM_STD * math.sqrt(2 * math.pi))
    return normal * (torch.exp(-log_snr) + EDM_DATA**2) / EDM_DATA**2


def iddpm(log_snr: Tensor) -> Tensor:
    """sech(lambda / 2) = 2 sqrt(alpha (1 - alpha))."""
    return 1 / torch.cosh(log_snr / 2)


def sigmoid(log_snr: Tensor, k: float) -> Tensor:
    """sigmoid(k - lambda); for k = 0 it is p."""
    return torch.sigmoid(k - log_snr)


def flow_matching(log_snr: Tensor) -> Tensor:
    """exp(-lambda / 2) = sqrt(p / alpha)."""
    return torch.exp(-log_snr / 2)


def log_snr_of(p: Tensor) -> Tensor:
    """lambda = log((1 - p) / p) at masking rate p."""
    return -torch.logit(p.double().clamp(max=P_MAX))


def loss_weight(config: WeightConfig, p: Tensor, bound_weight: Tensor) -> Tensor:
    """What a masked token counts in the loss, from the block's rate p and its weight in the bound.

    `simple` is 1 under every proposal: plain cross-entropy on masked tokens.
    """
    if config.name == "simple":
        return torch.ones_like(bound_weight)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "elbo": torch.ones_like,
        "edm": edm,
        "iddpm": iddpm,
        "sigmoid": lambda log_snr: sigmoid(log_snr, config.sigmoid_k),
        "fm": flow_matching,
    }
    return functions[config.name](log_snr_of(p)) * bound_weight
