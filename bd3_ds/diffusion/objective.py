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
from bd3_ds.diffusion.chunked_head import HeadLoss
from bd3_ds.diffusion.noise import Noise, corrupt, maskable
from bd3_ds.diffusion.score_entropy import ScoreNats, sigma_of
from bd3_ds.diffusion.subs import SubsNats

BINS = 10


class Denoiser(Protocol):
    """What `read` makes of the network's head at N places `at` of the flattened x_t.

    Noisy x_t [b K, L], K views of each of the clean texts x0 [b, L]; sigma [b K] or None. `read` takes the hidden
    states, the output matrix and its bias, or through `of_logits` the logits [N, V].
    """

    def __call__(
        self, x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor, read: HeadLoss
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Loss:
    """`loss` is what training descends, `nelbo` the estimate of the bound; both nats per scored token, scalars.

    block_nats [b K, B], fp64: each block's summed nats over its maskable tokens, unweighted; nan where it has none,
    None for AR. `bin_nats` and `bin_masked` [BINS], fp64, sum -log p(x0) and masked tokens by masking rate.
    """

    loss: Tensor
    nelbo: Tensor
    block_nats: Tensor | None
    bin_nats: Tensor
    bin_masked: Tensor


def training_loss(
    name: str,
    denoiser: Denoiser,
    x0: Tensor,
    noise: Noise | None,
    mask_id: int,
    device: torch.device | None = None,
) -> Loss:
    """The loss of objective `name` for clean tokens x0 [b, L]; AR takes no noise.

    Noise of b K rows makes K views of each text, which share its clean pass. Where x0 and the noise lie on the host,
    masks are made there and only sent to `device`, so that the host need not wait for it.

    Where tokens of a block have rates of their own, p_i, their nats count p / p_i in the estimate of the bound: so each
    token counts as often as at the block's rate p. What it sees around it still differs, so the estimate is not exact.
    """
    device = x0.device if device is None else device
    if name == AR:
        return _autoregressive(denoiser, send(x0, device), mask_id)
    assert noise is not None
    (rows, blocks), length = noise.rate.shape, x0.shape[1]
    spread = length // blocks
    clean = x0.repeat_interleave(rows // len(x0), dim=0)  # [b K, L]
    rate = noise.rate.repeat_interleave(spread, dim=1)  # [b K, L]
    x_t, masked = corrupt(clean, rate if noise.token_rate is None else noise.token_rate, noise.draws, mask_id)
    at = masked.flatten().nonzero()[:, 0]  # [N]
    scored = rows * (length - 1)
    rate_at = rate.flatten()[at]
    fair = torch.ones_like(rate_at) if noise.token_rate is None else rate_at / noise.token_rate.flatten()[at]
    weight = noise.loss_weight.repeat_interleave(spread, dim=1).flatten()[at].float() / scored
    targets = clean.flatten()[at]
    x_t, x0, at, rate_at, fair, weight, targets, bound_weight = (
        send(tensor, device) for tensor in (x_t, x0, at, rate_at, fair, weight, targets, noise.bound_weight)
    )
    if name == SEDD:
        sigma = send(sigma_of(rate[:, 0]).float(), device)
        loss, nats = denoiser(
            x_t,
            None,
            sigma=sigma,
            at=at,
            read=ScoreNats(targets=targets, sigma=sigma[at // length], mask_id=mask_id, weight=weight),
        )
    else:
        loss, nats = denoiser(x_t, x0, sigma=None, at=at, read=SubsNats(targets, mask_id, weight))

    known = nats.double()
    by_token = torch.zeros(rows * length, dtype=torch.float64, device=device).index_copy_(0, at, known * fair)
    by_block = by_token.view(rows, blocks, spread).sum(-1)  # [b K, B]
    return Loss(
        loss,
        ((bound_weight * by_block).sum() / scored).float(),
        by_block / send(maskable(blocks, spread), device),
        *_by_rate(known, rate_at.float()),
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, whose host does not wait for it."""
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _autoregressive(denoiser: Denoiser, x0: Tensor, mask_id: int) -> Loss:
    """Token i from tokens before it; every position is a masked position at rate 1."""
    batch, length = x0.shape
    at = torch.arange(batch * length, device=x0.device).view(batch, length)[:, :-1].flatten()  # [N]
    targets = x0[:, 1:].flatten()
    weight = torch.full(at.shape, 1 / len(at), device=x0.device)
    loss, nats = denoiser(x0, None, sigma=None, at=at, read=SubsNats(targets, mask_id, weight))
    return Loss(loss, loss.detach(), None, *_by_rate(nats.double(), torch.ones_like(nats)))


def _by_rate(nats: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    # fp64: tens of thousands of numbers are added one by one, which costs fp32 three of its digits.
    index = (rate * BINS).long().clamp(max=BINS - 1)
    zeros = torch.zeros(BINS, device=nats.device, dtype=nats.dtype)
    return zeros.index_add(0, index, nats), zeros.index_add(0, index, torch.ones_like(nats))
