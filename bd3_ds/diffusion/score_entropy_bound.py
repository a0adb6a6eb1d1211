"""The bound of a SEDD network, from its own score entropy: Monte Carlo over time (docs/objective.md)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bd3_ds.diffusion.likelihood import T_MIN, Bound, Texts
from bd3_ds.diffusion.score_entropy import ScoreNats, sigma_of
from bd3_ds.runtime.rng import Purpose, generator

# `read` applied to the head at N positions `at` of the flattened x_t [n, L] at noise levels sigma [n].
ScoreNetwork = Callable[[Tensor, Tensor, Tensor, ScoreNats], tuple[Tensor, Tensor]]


def score_entropy_bound(network: ScoreNetwork, texts: Texts, mask_id: int, views: int, seed: int) -> Bound:
    """The NELBO of clean texts, in nats, from `views` noisy versions of each sequence in one pass.

    View k takes one time t from the k-th of `views` equal strata of [1e-3, 1] and has weight 1/t. Draws depend on
    (seed, number of the sequence), not on batching. What is not scored is given, or hidden where x0 holds the mask id
    (`likelihood.py`). Only scored tokens are noised, so that the bound is that of the reverse process of these only.
    """
    x0 = texts.x0
    batch, length = x0.shape
    t = np.zeros((batch, views))
    masked = np.zeros((batch, views, length), dtype=bool)
    for row in range(batch):
        rng = generator(seed, Purpose.EVALUATION, texts.first_row + row)
        t[row] = T_MIN + (1 - T_MIN) * (np.arange(views) + rng.random(views)) / views
        masked[row] = rng.random((views, length)) < t[row, :, None]
    scored = texts.scored_positions().cpu()

    time = torch.from_numpy(t).flatten()  # [b K]
    sigma = sigma_of(time).float().to(x0.device)
    noised = (torch.from_numpy(masked) & scored[:, None]).flatten(0, 1)  # [b K, L]
    at = noised.flatten().nonzero()[:, 0].to(x0.device)  # [N]
    clean = x0.repeat_interleave(views, dim=0)
    x_t = torch.where(noised.to(x0.device), mask_id, clean)
    _, nats = network(x_t, sigma, at, ScoreNats(clean.flatten()[at], mask_id, sigma=sigma[at // length]))

    weighted = nats.double() / time.to(x0.device)[at // length]
    nelbo = torch.zeros(batch * views * length, dtype=torch.float64, device=x0.device)
    by_view = nelbo.index_copy_(0, at, weighted).view(batch, views, length)
    return Bound(by_view.mean(1), _variance_of_mean(by_view.sum(-1)), batch * views, int(scored.sum()))


def _variance_of_mean(values: Tensor) -> Tensor:
    """Variance [b] of the mean over views [b, K], from successive differences: neighbours share nearly one stratum."""
    views = values.shape[1]
    if views == 1:
        return values[:, 0] ** 2
    return values.diff(dim=1).square().sum(1) / (2 * (views - 1) * views)
