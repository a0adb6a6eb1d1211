"""The one bound of which every reported perplexity is made: exact, stratified or Monte-Carlo.

For one block of n maskable tokens, with c_i(M) = -log p(x_i | block with M masked, earlier blocks) for i in M,

    NELBO = sum_{m=1..n} mean over subsets M of size m of (1/m) sum_{i in M} c_i(M)      (p integrated out)
          = integral_0^1 (1/p) E_{M ~ Bernoulli(p)} sum_{i in M} c_i(M) dp

Position 0 is given: the first block has one maskable token less. All values are nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
from torch import Tensor

from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.runtime.rng import Purpose, generator

T_MIN = 1e-3  # the Monte-Carlo protocol of the paper draws t from [1e-3, 1]

# Uniform numbers u in (0, 1) to masking rates and the weights of the masked losses, fp64 of the same shape.
RateDraw = Callable[[Tensor], tuple[Tensor, Tensor]]
# What `read` makes of the head at N places `at` of the flattened noisy views x_t [b, K, L].
ViewDenoiser = Callable[[Tensor, Tensor, SubsNats], tuple[Tensor, Tensor]]
# What `read` makes of a causal network's head at N places `at` of the flattened text [b, L].
CausalNetwork = Callable[[Tensor, Tensor, SubsNats], tuple[Tensor, Tensor]]
# Clean text [b, L] to its ViewDenoiser: work that the views share (the clean pass) is done here, once.
Condition = Callable[[Tensor], ViewDenoiser]


@dataclass(frozen=True)
class Bound:
    """NELBO of a batch of sequences.

    nelbo: [b, L] nats by token; a block's bound is spread over its tokens, so only sums over whole blocks have meaning.
    variance: [b] variance of a sequence's summed NELBO that the estimator itself adds (0 when exact).
    forwards: passes of the network over a sequence, noisy views and clean passes together. The value, its standard
    error and the number of tokens scored follow: `total`, `stderr`, `tokens`.
    """

    nelbo: Tensor
    variance: Tensor
    forwards: int

    @property
    def total(self) -> float:
        """The NELBO of the whole batch in nats."""
        return float(self.nelbo.double().sum())

    @property
    def tokens(self) -> int:
        """Tokens scored: all but each sequence's first."""
        return len(self.nelbo) * (self.nelbo.shape[1] - 1)

    @property
    def stderr(self) -> Tensor:
        """Standard error [b] of each sequence's summed NELBO."""
        return self.variance.sqrt()


def autoregressive(network: CausalNetwork, x0: Tensor, mask_id: int) -> Bound:
    """The exact NLL of tokens 1 … L-1 of x0 [b, L]."""
    at = torch.arange(x0.numel(), device=x0.device).view(x0.shape)[:, :-1].flatten()
    _, nats = network(x0, at, SubsNats(x0[:, 1:].flatten(), mask_id))
    nelbo = torch.zeros(x0.shape, device=x0.device)
    nelbo[:, 1:] = nats.view(len(x0), -1)
    return Bound(nelbo, torch.zeros(len(x0), device=x0.device), len(x0))


def exact(condition: Condition, x0: Tensor, block_size: int, mask_id: int, at_once: int = 64) -> Bound:
    """The NELBO without sampling: all 2^L' - 1 masks of a block, `at_once` noisy sequences a pass."""
    batch, length = x0.shape
    subsets = torch.arange(1, 2**block_size)
    pattern = (subsets[:, None] >> torch.arange(block_size)) & 1  # [M, L']
    size = pattern.sum(1)
    denoise = condition(x0)
    nelbo = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
    views = max(1, at_once // batch)
    for start in range(0, len(subsets), views):
        part = slice(start, start + views)
        masked = pattern[part].bool().repeat(1, length // block_size)  # [K, L]
        weight = 1.0 / (size[part].double() * _choose(block_size, size[part]))  # [K]
        weight = weight[:, None].repeat(1, length)
        # The first block has L' - 1 maskable tokens: views that mask position 0 do not count there.
        first = torch.where(
            pattern[part][:, 0] == 1, 0.0, 1.0 / (size[part].double() * _choose(block_size - 1, size[part]))
        )
        weight[:, :block_size] = first[:, None]
        masked[:, 0] = False
        nats = _view_nats(denoise, x0, masked.to(x0.device).expand(batch, -1, -1), mask_id)  # [b, K, L]
        nelbo += (nats * weight.to(x0.device)).sum(1)
    return Bound(
        nelbo, torch.zeros(batch, dtype=torch.float64, device=x0.device), batch * len(subsets) + _clean(x0, block_size)
    )


def stratified(
    condition: Condition, x0: Tensor, block_size: int, mask_id: int, views: int, seed: int, first_sequence: int = 0
) -> Bound:
    """An unbiased estimate by drawing the number of masked tokens m from strata of 1 … n, then which ones uniformly.

    View k of a block takes the k-th of `views` equal strata, with one jitter for all, so that the views of a block
    spread evenly over m. Draws depend on (seed, number of the sequence), not on batching.
    """
    batch, length = x0.shape
    blocks = length // block_size
    maskable = np.full(blocks, block_size)
    maskable[0] -= 1
    masked = np.zeros((batch, views, blocks, block_size), dtype=bool)
    weight = np.zeros((batch, views, blocks))
    for row in range(batch):
        rng = generator(seed, Purpose.EVALUATION, first_sequence + row)
        u = (np.arange(views)[:, None] + rng.random(blocks)) / views  # [K, B]
        count = np.minimum(1 + np.floor(u * maskable), maskable)  # [K, B]
        keys = rng.random((views, blocks, block_size))
        keys[:, 0, 0] = np.inf
        rank = keys.argsort(-1).argsort(-1)
        masked[row] = rank < count[:, :, None]
        weight[row] = np.divide(maskable, count, out=np.zeros_like(count), where=count > 0)
    return _sampled(condition, x0, masked, weight, block_size, mask_id)


def paper_rates(u: Tensor) -> tuple[Tensor, Tensor]:
    """The RateDraw of the paper's protocol: t in [1e-3, 1], weight 1/t."""
    t = T_MIN + (1 - T_MIN) * u
    return t, 1 / t


def monte_carlo(
    condition: Condition,
    x0: Tensor,
    block_size: int,
    mask_id: int,
    views: int,
    seed: int,
    first_sequence: int = 0,
    draw: RateDraw = paper_rates,
) -> Bound:
    """The paper's protocol: a rate per block, evenly spread over a sequence's blocks, Bernoulli masks.

    Another `draw` than the paper's has the value that its weights give, which need not be the bound.
    """
    batch, length = x0.shape
    blocks = length // block_size
    masked = np.zeros((batch, views, blocks, block_size), dtype=bool)
    weight = np.zeros((batch, views, blocks))
    for row in range(batch):
        rng = generator(seed, Purpose.EVALUATION, first_sequence + row)
        order = rng.permuted(np.tile(np.arange(blocks), (views, 1)), axis=1)
        rate, weights = draw(torch.from_numpy((order + rng.random((views, blocks))) / blocks))  # each [K, B]
        masked[row] = rng.random((views, blocks, block_size)) < rate.numpy()[:, :, None]
        weight[row] = weights.numpy()
    masked[:, :, 0, 0] = False
    return _sampled(condition, x0, masked, weight, block_size, mask_id)


def _sampled(
    condition: Condition, x0: Tensor, masked: np.ndarray, weight: np.ndarray, block_size: int, mask_id: int
) -> Bound:
    """Average over drawn views; masked [b, K, B, L'], weight [b, K, B] for each block's summed losses."""
    batch, length = x0.shape
    views = masked.shape[1]
    at = torch.from_numpy(masked.reshape(batch, views, length)).to(x0.device)
    nats = _view_nats(condition(x0), x0, at, mask_id)
    weighted = nats * torch.from_numpy(weight).to(x0.device).repeat_interleave(block_size, dim=2)  # [b, K, L]
    by_block = weighted.view(batch, views, length // block_size, block_size).sum(-1)  # [b, K, B]
    return Bound(weighted.mean(1), _variance_of_mean(by_block).sum(-1), batch * views + _clean(x0, block_size))


def _variance_of_mean(values: Tensor) -> Tensor:
    """Variance [b, B] of the mean over views of values [b, K, B], from successive differences.

    Exact for independent views and, on average, not too small for stratified ones. One view says nothing of its own
    error: the spread over blocks, which holds the text's own variation too, stands in for it.
    """
    views, blocks = values.shape[1:]
    if views == 1:
        spread = values[:, 0].var(dim=1, keepdim=True) if blocks > 1 else values[:, 0] ** 2
        return spread.expand(-1, blocks)
    return values.diff(dim=1).square().sum(1) / (2 * (views - 1) * views)


def _view_nats(denoise: ViewDenoiser, x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """-log p(x0) in nats at masked places of [b, K, L], 0 elsewhere, fp64."""
    clean = x0[:, None].expand_as(masked)
    at = masked.flatten().nonzero()[:, 0]  # [N]
    _, known = denoise(torch.where(masked, mask_id, clean), at, SubsNats(clean.flatten()[at], mask_id))
    nats = torch.zeros(masked.numel(), dtype=torch.float64, device=x0.device)
    return nats.index_copy_(0, at, known.double()).view(masked.shape)


def _choose(n: int, sizes: Tensor) -> Tensor:
    """n over m for each m in sizes; 1 where it would be 0 (such views carry no weight)."""
    return torch.tensor([max(1, comb(n, int(m))) for m in sizes], dtype=torch.float64)


def _clean(x0: Tensor, block_size: int) -> int:
    """Clean passes that a batch needs: none where one block is the whole text."""
    return len(x0) if block_size < x0.shape[1] else 0
