"""The training objectives: AR, MDLM, SEDD and BD3-LM, on a denoiser that is handed in.

Each turns a micro-batch and its noise into one differentiable number in nats per scored token. Position 0 of a
sequence is given, so L - 1 of its L tokens are scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bd3_ds.config.schema import AR, SEDD
from bd3_ds.diffusion.noise import Noise, corrupt, maskable
from bd3_ds.diffusion.score_entropy import score_nll, sigma_of
from bd3_ds.diffusion.subs import subs_nll

BINS = 10


class Denoiser(Protocol):
    """Logits [N, V] at the N true places of `at` [b, L], for noisy x_t and clean x0, both [b, L]; sigma [b] or None."""

    def __call__(self, x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Loss:
    """`loss` is what training descends, `nelbo` the estimate of the bound; both nats per scored token, scalars.

    block_nats [b, B], fp64: each block's summed nats over its maskable tokens, unweighted; nan where it has none, None
    for AR. `bin_nats` and `bin_masked` [BINS], fp64, sum -log p(x0) and masked tokens by their block's masking rate.
    """

    loss: Tensor
    nelbo: Tensor
    block_nats: Tensor | None
    bin_nats: Tensor
    bin_masked: Tensor


def training_loss(name: str, denoiser: Denoiser, x0: Tensor, noise: Noise | None, mask_id: int) -> Loss:
    """The loss of objective `name` for clean tokens x0 [b, L]; AR takes no noise.

    Where tokens of a block have rates of their own, p_i, their nats count p / p_i in the estimate of the bound: so each
    token counts as often as at the block's rate p. What it sees around it still differs, so the estimate is not exact.
    """
    if name == AR:
        return _autoregressive(denoiser, x0, mask_id)
    assert noise is not None
    batch, length = x0.shape
    blocks = noise.rate.shape[1]
    spread = length // blocks
    rate = noise.rate.repeat_interleave(spread, dim=1)  # [b, L]
    x_t, masked = corrupt(x0, rate if noise.token_rate is None else noise.token_rate, noise.draws, mask_id)
    targets = x0[masked]
    if name == SEDD:
        sigma = sigma_of(rate[:, 0]).float()
        logits = denoiser(x_t, None, sigma=sigma, at=masked)
        sigma_at = sigma[:, None].expand(batch, length)[masked]
        nats = score_nll(logits, targets, sigma_at, torch.ones_like(sigma_at), mask_id)
    else:
        logits = denoiser(x_t, x0, sigma=None, at=masked)
        nats = subs_nll(logits, targets, mask_id)
    scored = batch * (length - 1)
    weight = noise.loss_weight.repeat_interleave(spread, dim=1)[masked].float()  # [N]
    loss = (weight * nats).sum() / scored

    known = nats.detach().double()
    fair = known if noise.token_rate is None else known * (rate / noise.token_rate)[masked]
    by_block = torch.zeros_like(rate).masked_scatter(masked, fair).view(batch, blocks, spread).sum(-1)  # [b, B]
    return Loss(
        loss,
        ((noise.bound_weight * by_block).sum() / scored).float(),
        by_block / maskable(blocks, spread, x0.device),
        *_by_rate(known, rate[masked].float()),
    )


def _autoregressive(denoiser: Denoiser, x0: Tensor, mask_id: int) -> Loss:
    """Token i from tokens before it; every position is a masked position at rate 1."""
    at = torch.ones_like(x0, dtype=torch.bool)
    at[:, -1] = False
    logits = denoiser(x0, None, sigma=None, at=at)
    nats = subs_nll(logits, x0[:, 1:].reshape(-1), mask_id)
    loss = nats.mean()
    return Loss(loss, loss.detach(), None, *_by_rate(nats.detach().double(), torch.ones_like(nats)))


def _by_rate(nats: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    # fp64: tens of thousands of numbers are added one by one, which costs fp32 three of its digits.
    index = (rate * BINS).long().clamp(max=BINS - 1)
    zeros = torch.zeros(BINS, device=nats.device, dtype=nats.dtype)
    return zeros.index_add(0, index, nats), zeros.index_add(0, index, torch.ones_like(nats))
