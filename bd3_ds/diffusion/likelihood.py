"""The likelihood bound behind every reported perplexity: exact, stratified or Monte-Carlo estimators of the NELBO.

For one block of n maskable tokens, with c_i(M) = -log p(x_i | block with M masked, earlier blocks) for i in M,

    NELBO = sum_{m=1..n} mean over subsets M of size m of (1/m) sum_{i in M} c_i(M)      (p integrated out)
          = integral_0^1 (1/p) E_{M ~ Bernoulli(p)} sum_{i in M} c_i(M) dp

Position 0 is given and padding is not scored: a block has so many maskable tokens less. All values are nats.

A part of a text, given the rest: `Texts.scored` marks the positions that are masked and scored. Any other position is
given, that is shown as it is, or hidden: x0 itself holds the mask id there, and so do all views. With n counting scored
positions only, the value bounds -log p(scored | given) of the process that writes block after block and in a block,
beside its given tokens, the scored ones one at a time in an order drawn uniformly: the sum above is the expectation
over that order of the nats paid, and -log of an expectation is at most the expectation of -log. Hidden positions are
written after the scored ones of their block, if ever. They are for the rest of a block after the end of a text: later
blocks would read them in the clean text, so that none of those may be scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
from torch import Tensor

from bd3_ds.diffusion.noise import next_token_targets, scored_positions
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.runtime.rng import Purpose, generator

T_MIN = 1e-3  # the Monte-Carlo protocol of the paper draws t from [1e-3, 1]

# Uniform numbers u in (0, 1) to masking rates and the weights of the masked losses, fp64 of the same shape.
RateDraw = Callable[[Tensor], tuple[Tensor, Tensor]]
# `read` applied to the head at N positions `at` of the flattened noisy views x_t [b, K, L].
ViewDenoiser = Callable[[Tensor, Tensor, SubsNats], tuple[Tensor, Tensor]]
# `read` applied to a causal network's head at N positions `at` of the flattened text [b, L].
CausalNetwork = Callable[[Tensor, Tensor, SubsNats], tuple[Tensor, Tensor]]
# Clean text [b, L] to its ViewDenoiser: work that the views share (the clean pass) is done here, once.
Condition = Callable[[Tensor], ViewDenoiser]


@dataclass(frozen=True)
class Texts:
    """Clean texts to score.

    x0: [b, L] token ids. documents: [b, L] each token's document, below 0 at padding; None where there is none of it
    and tokens see the whole text. scored: [b, L] bool, the positions to score; None for all. first_row: the number of
    the first row in its set; sampled estimators draw by it, so that results do not depend on batching.
    """

    x0: Tensor
    documents: Tensor | None = None
    scored: Tensor | None = None
    first_row: int = 0

    def __len__(self) -> int:
        return len(self.x0)

    def scored_positions(self) -> Tensor:
        """The positions that are scored, bool [b, L]: position 0 and padding never are."""
        return scored_positions(self.x0, self.documents, self.scored)

    def rows(self, first: int, count: int) -> Texts:
        """`count` rows from row `first` on, fewer at the end."""
        documents, scored = (
            None if each is None else each[first : first + count] for each in (self.documents, self.scored)
        )
        return Texts(self.x0[first : first + count], documents, scored, self.first_row + first)

    def to(self, device: torch.device) -> Texts:
        """The same on `device`."""
        documents, scored = (None if each is None else each.to(device) for each in (self.documents, self.scored))
        return Texts(self.x0.to(device), documents, scored, self.first_row)


@dataclass(frozen=True)
class Estimator:
    """How a bound is computed.

    name: exact, stratified, mc or report. views: noisy views a sequence, for those that sample. seed: of their draws.
    at_once: noisy sequences of a pass.
    """

    name: str
    views: int = 8
    seed: int = 0
    at_once: int = 64


@dataclass(frozen=True)
class Bound:
    """NELBO of a batch of sequences.

    nelbo: [b, L] nats by token; a block's bound is spread over its tokens, so only sums over whole blocks have meaning.
    variance: [b] variance of a sequence's summed NELBO that the estimator itself adds (0 when exact).
    forwards: passes of the network over a sequence, noisy views and clean passes together.
    tokens: scored ones; by default all but each sequence's first and padding. The value and its
    standard error follow: `total`, `stderr`.
    """

    nelbo: Tensor
    variance: Tensor
    forwards: int
    tokens: int

    @property
    def total(self) -> float:
        """The NELBO of the whole batch in nats."""
        return float(self.nelbo.double().sum())

    @property
    def stderr(self) -> Tensor:
        """Standard error [b] of each sequence's summed NELBO."""
        return self.variance.sqrt()


def autoregressive(network: CausalNetwork, texts: Texts, mask_id: int) -> Bound:
    """The exact NLL of tokens 1 … L-1, or of the scored ones, each given all tokens before it."""
    x0 = texts.x0
    at, of = next_token_targets(x0, texts.documents, texts.scored)
    _, nats = network(x0, at, SubsNats(x0.flatten()[of], mask_id))
    nelbo = torch.zeros(x0.numel(), device=x0.device).index_copy_(0, of, nats.float()).view(x0.shape)
    return Bound(nelbo, torch.zeros(len(x0), device=x0.device), len(x0), len(of))


def exact(condition: Condition, texts: Texts, block_size: int, mask_id: int, at_once: int = 64) -> Bound:
    """The NELBO without sampling: all 2^n - 1 masks of a block of n scored tokens, `at_once` noisy sequences a pass.

    n is that of the block with most; of the masks, those that hold more tokens than another block has weigh nothing
    there.
    """
    x0, batch = texts.x0, len(texts)
    scored = texts.scored_positions().cpu()  # where masks are made
    by_block = scored.view(batch, -1, block_size)  # [b, B, L']
    maskable = by_block.sum(-1)  # [b, B]
    most = int(maskable.max())
    subsets = torch.arange(1, 2**most)  # bit j: the block's j-th scored token is masked
    pattern = ((subsets[:, None] >> torch.arange(most)) & 1).bool()  # [M, n]
    size = pattern.sum(1)
    rank = (by_block.cumsum(-1) - 1).clamp(min=0)  # [b, B, L'], j of a scored position
    # n over m; 1 where it would be 0, of masks that do not fit.
    choose = torch.tensor([[max(1, comb(n, m)) for m in range(most + 1)] for n in range(most + 1)]).double()
    denoise = condition(x0)
    nelbo = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
    views = max(1, at_once // batch)
    for start in range(0, len(subsets), views):
        part = slice(start, start + views)
        chosen = pattern[part][:, rank].transpose(0, 1)  # [b, K, B, L']
        masked = (by_block[:, None] & chosen).flatten(2)  # [b, K, L]
        count, fits = size[part, None], subsets[part, None] < 2 ** maskable[:, None]  # [K, 1], [b, K, B]
        weight = (fits / (count * choose[maskable[:, None], count])).repeat_interleave(block_size, dim=2)  # [b, K, L]
        nats = _view_nats(denoise, x0, masked.to(x0.device), mask_id)
        nelbo += (nats * weight.to(x0.device)).sum(1)
    forwards = batch * len(subsets) + _clean(x0, block_size)
    return Bound(nelbo, torch.zeros(batch, dtype=torch.float64, device=x0.device), forwards, int(scored.sum()))


def stratified(condition: Condition, texts: Texts, block_size: int, mask_id: int, views: int, seed: int) -> Bound:
    """An unbiased estimate by drawing the number of masked tokens m from strata of 1 … n, then which ones uniformly.

    View k of a block takes the k-th of `views` equal strata, with one jitter for all, so that the views of a block
    spread evenly over m. Draws depend on (seed, number of the sequence), not on batching.
    """
    batch, length = texts.x0.shape
    blocks = length // block_size
    may_mask = texts.scored_positions().cpu().numpy().reshape(batch, blocks, block_size)
    masked = np.zeros((batch, views, blocks, block_size), dtype=bool)
    weight = np.zeros((batch, views, blocks))
    for row in range(batch):
        rng = generator(seed, Purpose.EVALUATION, texts.first_row + row)
        u = (np.arange(views)[:, None] + rng.random(blocks)) / views  # [K, B]
        maskable = may_mask[row].sum(-1)  # [B]
        count = np.minimum(1 + np.floor(u * maskable), maskable)  # [K, B]
        keys = rng.random((views, blocks, block_size))
        keys[:, ~may_mask[row]] = np.inf
        rank = keys.argsort(-1).argsort(-1)
        masked[row] = rank < count[:, :, None]
        weight[row] = np.divide(maskable, count, out=np.zeros_like(count), where=count > 0)
    return _sampled(condition, texts.x0, masked & may_mask[:, None], weight, block_size, mask_id, int(may_mask.sum()))


def paper_rates(u: Tensor) -> tuple[Tensor, Tensor]:
    """The RateDraw of the paper's protocol: t in [1e-3, 1], weight 1/t."""
    t = T_MIN + (1 - T_MIN) * u
    return t, 1 / t


def monte_carlo(
    condition: Condition,
    texts: Texts,
    block_size: int,
    mask_id: int,
    views: int,
    seed: int,
    draw: RateDraw = paper_rates,
) -> Bound:
    """The paper's protocol: a rate per block, evenly spread over a sequence's blocks, Bernoulli masks.

    Another `draw` than the paper's has the value that its weights give, which need not be the bound.
    """
    batch, length = texts.x0.shape
    blocks = length // block_size
    masked = np.zeros((batch, views, blocks, block_size), dtype=bool)
    weight = np.zeros((batch, views, blocks))
    for row in range(batch):
        rng = generator(seed, Purpose.EVALUATION, texts.first_row + row)
        order = rng.permuted(np.tile(np.arange(blocks), (views, 1)), axis=1)
        rate, weights = draw(torch.from_numpy((order + rng.random((views, blocks))) / blocks))  # each [K, B]
        masked[row] = rng.random((views, blocks, block_size)) < rate.numpy()[:, :, None]
        weight[row] = weights.numpy()
    may_mask = texts.scored_positions().cpu().numpy().reshape(batch, 1, blocks, block_size)
    return _sampled(condition, texts.x0, masked & may_mask, weight, block_size, mask_id, int(may_mask.sum()))


def _sampled(
    condition: Condition, x0: Tensor, masked: np.ndarray, weight: np.ndarray, block_size: int, mask_id: int, tokens: int
) -> Bound:
    """Average over drawn views; masked [b, K, B, L'], weight [b, K, B] for each block's summed losses."""
    batch, length = x0.shape
    views = masked.shape[1]
    at = torch.from_numpy(masked.reshape(batch, views, length)).to(x0.device)
    nats = _view_nats(condition(x0), x0, at, mask_id)
    weighted = nats * torch.from_numpy(weight).to(x0.device).repeat_interleave(block_size, dim=2)  # [b, K, L]
    by_block = weighted.view(batch, views, length // block_size, block_size).sum(-1)  # [b, K, B]
    forwards = batch * views + _clean(x0, block_size)
    return Bound(weighted.mean(1), _variance_of_mean(by_block).sum(-1), forwards, tokens)


def _variance_of_mean(values: Tensor) -> Tensor:
    """Variance [b, B] of the mean over views of values [b, K, B], from successive differences.

    Exact for independent views and, on average, not too small for stratified ones. One view gives no estimate of its
    own error: the spread over blocks, which holds the text's own variation too, stands in for it.
    """
    views, blocks = values.shape[1:]
    if views == 1:
        spread = values[:, 0].var(dim=1, keepdim=True) if blocks > 1 else values[:, 0] ** 2
        return spread.expand(-1, blocks)
    return values.diff(dim=1).square().sum(1) / (2 * (views - 1) * views)


def _view_nats(denoise: ViewDenoiser, x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """-log p(x0) in nats at masked positions of [b, K, L], 0 elsewhere, fp64."""
    clean = x0[:, None].expand_as(masked)
    at = masked.flatten().nonzero()[:, 0]  # [N]
    _, known = denoise(torch.where(masked, mask_id, clean), at, SubsNats(clean.flatten()[at], mask_id))
    nats = torch.zeros(masked.numel(), dtype=torch.float64, device=x0.device)
    return nats.index_copy_(0, at, known.double()).view(masked.shape)


def _clean(x0: Tensor, block_size: int) -> int:
    """Clean passes that a batch needs: none where one block is the whole text."""
    return len(x0) if block_size < x0.shape[1] else 0
