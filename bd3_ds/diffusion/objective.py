"""The training objectives: AR, MDLM, SEDD and BD3-LM, on a denoiser that is handed in.

Each turns a micro-batch and its noise into one differentiable number in nats per scored token. Position 0 of a
sequence is given, so L - 1 of its L tokens are scored, or fewer where there is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bd3_ds.config.schema import AR, SEDD
from bd3_ds.diffusion.chunked_head import HeadLoss
from bd3_ds.diffusion.noise import Noise, corrupt, next_tokens, scored_places
from bd3_ds.diffusion.score_entropy import ScoreNats, sigma_of
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.runtime.transfer import send

BINS = 10


class Denoiser(Protocol):
    """What `read` makes of the network's head at N places `at` of the flattened x_t.

    `at` lies where x_t does, or, for a denoiser that says `places_on_host`, where the noise was drawn: what else it
    makes of them may then have shapes that depend on values, for which a host would wait.
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
    None for AR; block_weight [b K, B], fp64, the noise's bound_weight, where they lie. `bin_nats` and `bin_masked`
    [BINS], fp64, sum -log p(x0) and masked tokens by masking rate.
    """

    loss: Tensor
    nelbo: Tensor
    block_nats: Tensor | None
    block_weight: Tensor | None
    bin_nats: Tensor
    bin_masked: Tensor


def training_loss(
    name: str,
    denoiser: Denoiser,
    x0: Tensor,
    noise: Noise | None,
    mask_id: int,
    device: torch.device | None = None,
    documents: Tensor | None = None,
    scored_tokens: float | None = None,
) -> Loss:
    """The loss of objective `name` for clean tokens x0 [b, L]; AR takes no noise.

    Padding, where documents [b, L] are below 0, costs nothing. The sum of nats is divided by `scored_tokens` a
    sequence, L - 1 by default: a constant, so that a token counts the same in whatever micro-batch it stands.

    Noise of b K rows makes K views of each text, which share its clean pass. Where x0, `documents` and the noise lie on
    the host, masks are made there and only sent to `device`, so that the host need not wait for it.

    Where tokens of a block have rates of their own, p_i, their nats count p / p_i in the estimate of the bound: so each
    token counts as often as at the block's rate p. What it sees around it still differs, so the estimate is not exact.
    """
    device = x0.device if device is None else device
    length = x0.shape[1]
    per_sequence = length - 1 if scored_tokens is None else scored_tokens
    if name == AR:
        return _autoregressive(denoiser, x0, mask_id, device, documents, per_sequence)
    assert noise is not None
    rows, blocks = noise.rate.shape
    spread, views = length // blocks, rows // len(x0)
    clean = x0.repeat_interleave(views, dim=0)  # [b K, L]
    can_be = scored_places(x0, documents).repeat_interleave(views, dim=0)  # [b K, L]
    rate = noise.rate.repeat_interleave(spread, dim=1)  # [b K, L]
    x_t, masked = corrupt(clean, rate if noise.token_rate is None else noise.token_rate, noise.draws, mask_id, can_be)
    at = masked.flatten().nonzero()[:, 0]  # [N]
    scored = rows * per_sequence
    rate_at = rate.flatten()[at]
    fair = torch.ones_like(rate_at) if noise.token_rate is None else rate_at / noise.token_rate.flatten()[at]
    weight = noise.loss_weight.repeat_interleave(spread, dim=1).flatten()[at].float() / scored
    targets = clean.flatten()[at]
    places = at
    x_t, x0, at, rate_at, fair, weight, targets, bound_weight = (
        send(tensor, device) for tensor in (x_t, x0, at, rate_at, fair, weight, targets, noise.bound_weight)
    )
    asked = places if _on_host(denoiser) else at
    if name == SEDD:
        sigma = send(sigma_of(rate[:, 0]).float(), device)
        loss, nats = denoiser(
            x_t,
            None,
            sigma=sigma,
            at=asked,
            read=ScoreNats(targets=targets, sigma=sigma[at // length], mask_id=mask_id, weight=weight),
        )
    else:
        loss, nats = denoiser(x_t, x0, sigma=None, at=asked, read=SubsNats(targets, mask_id, weight))

    known = nats.double()
    by_token = torch.zeros(rows * length, dtype=torch.float64, device=device).index_copy_(0, at, known * fair)
    by_block = by_token.view(rows, blocks, spread).sum(-1)  # [b K, B]
    return Loss(
        loss,
        ((bound_weight * by_block).sum() / scored).float(),
        by_block / send(can_be.view(rows, blocks, spread).sum(-1).double(), device),
        bound_weight,
        *_by_rate(known, rate_at.float()),
    )


def _on_host(denoiser: Denoiser) -> bool:
    """Whether it wants its places where the noise was drawn."""
    return bool(getattr(denoiser, "places_on_host", False))


def _autoregressive(
    denoiser: Denoiser, x0: Tensor, mask_id: int, device: torch.device, documents: Tensor | None, per_sequence: float
) -> Loss:
    """Token i from tokens before it; every position is a masked position at rate 1."""
    at, of = next_tokens(x0, documents)
    targets = send(x0.flatten()[of], device)
    at, x0 = at if _on_host(denoiser) else send(at, device), send(x0, device)
    weight = torch.full(at.shape, 1 / (len(x0) * per_sequence), device=device)
    loss, nats = denoiser(x0, None, sigma=None, at=at, read=SubsNats(targets, mask_id, weight))
    return Loss(loss, loss.detach(), None, None, *_by_rate(nats.double(), torch.ones_like(nats)))


def _by_rate(nats: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    # fp64: tens of thousands of numbers are added one by one, which costs fp32 three of its digits.
    index = (rate * BINS).long().clamp(max=BINS - 1)
    zeros = torch.zeros(BINS, device=nats.device, dtype=nats.dtype)
    return zeros.index_add(0, index, nats), zeros.index_add(0, index, torch.ones_like(nats))
