"""The training loss of a micro-batch: the interfaces of objectives and denoisers, and the masked-diffusion loss.

Each objective (`objectives/`) turns a micro-batch and its noise into one differentiable number in nats per scored
token. Position 0 of a sequence is given, so L - 1 of its L tokens are scored, or fewer where there is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.diffusion.chunked_head import HeadLoss
from bd3_ds.diffusion.noise import Noise, corrupt, scored_positions
from bd3_ds.diffusion.subs import SubsNats
from bd3_ds.runtime.host_to_device import send

BINS = 10


class Denoiser(Protocol):
    """A network as objectives call it: the result of `read` on its head at N positions `at` of the flattened x_t.

    `at` lies where x_t does, or, for a denoiser with `positions_on_host`, where the noise was drawn: what it computes
    from them may then have shapes that depend on values, for which a host would wait.
    Noisy x_t [b K, L], K views of each of the clean texts x0 [b, L]; sigma [b K] or None. `read` takes the hidden
    states, the output matrix and its bias, or through `of_logits` the logits [N, V].
    """

    def __call__(
        self, x_t: Tensor, x0: Tensor | None, *, sigma: Tensor | None, at: Tensor, read: HeadLoss
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Loss:
    """`loss` is what training minimises, `nelbo` the estimate of the bound; both nats per scored token, scalars.

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


@dataclass(frozen=True)
class Batch:
    """The input of an objective's loss: clean tokens x0 [b, L] and their noise, None for a causal one.

    Padding, where documents [b, L] are below 0, costs nothing. The sum of nats is divided by `scored_per_sequence` a
    sequence: a constant, so that a token counts the same in whatever micro-batch it stands. Where x0, `documents` and
    the noise lie on the host, masks are made there and only sent to `device`, so that the host need not wait for it.
    """

    x0: Tensor
    noise: Noise | None
    mask_id: int
    device: torch.device
    documents: Tensor | None
    scored_per_sequence: float


@dataclass(frozen=True)
class MaskedTokens:
    """The masked tokens of a micro-batch; all on the network's device but rate and denoiser_at.

    x_t [b K, L] noisy tokens; x0 [b, L]; rate [b K, L] the rates of the tokens' blocks, where they were drawn; at [N]
    positions in the flattened x_t; denoiser_at: the same, where the denoiser takes them; targets [N] clean tokens;
    weight [N] of their nats in the loss.
    """

    x_t: Tensor
    x0: Tensor
    rate: Tensor
    at: Tensor
    denoiser_at: Tensor
    targets: Tensor
    weight: Tensor
    mask_id: int


# The loss and the nats [N] of masked tokens by a denoiser: the one thing in which masked objectives differ.
MaskedTokenLoss = Callable[[Denoiser, MaskedTokens], tuple[Tensor, Tensor]]


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
    """The loss of objective `name` for clean tokens x0 [b, L]; a causal one takes no noise.

    `scored_tokens` are those of a sequence by which the sum of nats is divided, L - 1 by default; see `Batch`.
    """
    per_sequence = x0.shape[1] - 1 if scored_tokens is None else scored_tokens
    batch = Batch(x0, noise, mask_id, x0.device if device is None else device, documents, per_sequence)
    loss: Loss = OBJECTIVES[name].loss(denoiser, batch)
    return loss


def masked_loss(denoiser: Denoiser, batch: Batch, token_loss: MaskedTokenLoss) -> Loss:
    """The loss of masked diffusion: `token_loss` gives the nats of masked tokens, the noise their weights.

    Noise of b K rows makes K views of each text, which share its clean pass.

    Where tokens of a block have rates of their own, p_i, their nats have the importance weight p / p_i in the estimate
    of the bound. The context of a token still differs from that at rate p, so the estimate is not exact.
    """
    x0, noise, device = batch.x0, batch.noise, batch.device
    assert noise is not None
    length = x0.shape[1]
    rows, blocks = noise.rate.shape
    block_size, views = length // blocks, rows // len(x0)
    clean = x0.repeat_interleave(views, dim=0)  # [b K, L]
    maskable = scored_positions(x0, batch.documents).repeat_interleave(views, dim=0)  # [b K, L]
    rate = noise.rate.repeat_interleave(block_size, dim=1)  # [b K, L]
    token_rate = rate if noise.token_rate is None else noise.token_rate
    x_t, masked = corrupt(clean, token_rate, noise.draws, batch.mask_id, maskable)
    positions = masked.flatten().nonzero()[:, 0]  # [N]
    scored = rows * batch.scored_per_sequence
    rate_at = rate.flatten()[positions]
    importance = torch.ones_like(rate_at) if noise.token_rate is None else rate_at / token_rate.flatten()[positions]
    weight = noise.loss_weight.repeat_interleave(block_size, dim=1).flatten()[positions].float() / scored
    targets = clean.flatten()[positions]
    bound_weight = noise.bound_weight
    x_t, x0, at, rate_at, importance, weight, targets, bound_weight = (
        send(tensor, device) for tensor in (x_t, x0, positions, rate_at, importance, weight, targets, bound_weight)
    )
    denoiser_at = positions if takes_host_positions(denoiser) else at
    masked_tokens = MaskedTokens(x_t, x0, rate, at, denoiser_at, targets, weight, batch.mask_id)
    loss, nats = token_loss(denoiser, masked_tokens)

    known = nats.double()
    by_token = torch.zeros(rows * length, dtype=torch.float64, device=device).index_copy_(0, at, known * importance)
    by_block = by_token.view(rows, blocks, block_size).sum(-1)  # [b K, B]
    return Loss(
        loss,
        ((bound_weight * by_block).sum() / scored).float(),
        by_block / send(maskable.view(rows, blocks, block_size).sum(-1).double(), device),
        bound_weight,
        *by_rate(known, rate_at.float()),
    )


def cross_entropy(denoiser: Denoiser, tokens: MaskedTokens) -> tuple[Tensor, Tensor]:
    """The `MaskedTokenLoss` of a network that gives a distribution over tokens (SUBS)."""
    read = SubsNats(tokens.targets, tokens.mask_id, tokens.weight)
    return denoiser(tokens.x_t, tokens.x0, sigma=None, at=tokens.denoiser_at, read=read)


def takes_host_positions(denoiser: Denoiser) -> bool:
    """Whether it takes its positions where the noise was drawn."""
    return bool(getattr(denoiser, "positions_on_host", False))


def by_rate(nats: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of nats [N] and how many they are, [BINS] each, by masking rate [N]."""
    # fp64: tens of thousands of numbers are added one by one, which costs fp32 three of its digits.
    index = (rate * BINS).long().clamp(max=BINS - 1)
    zeros = torch.zeros(BINS, device=nats.device, dtype=nats.dtype)
    return zeros.index_add(0, index, nats), zeros.index_add(0, index, torch.ones_like(nats))
