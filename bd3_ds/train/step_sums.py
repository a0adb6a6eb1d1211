"""The sums of one optimizer step over ranks, packed into one fp64 all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_ds.diffusion.clip_search import TIME_BINS, Spread, spread_sums
from bd3_ds.diffusion.objective import BINS, Loss


class StepSums:
    """Sums of this rank's micro-batches, on the device; nothing here waits for it."""

    def __init__(self, device: torch.device, with_moments: bool):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device, dtype=torch.float64)

        self.means = zeros(2)  # loss and nelbo, of all ranks' micro-batches
        self.spread = zeros(3)  # see `spread_sums`
        self.bins = zeros(2 * BINS)  # nats and masked tokens by masking rate
        self.moments = zeros(3, TIME_BINS if with_moments else 0)
        self._counts = zeros(3)  # scored tokens; stop asked; still saving

    @property
    def nelbo(self) -> Tensor:
        """The share of the step's nelbo that this rank has."""
        return self.means[1]

    def add(self, loss: Loss, micro_batches: int) -> None:
        """One of the step's `micro_batches`, those of all ranks together."""
        self.means += torch.stack([loss.loss.detach(), loss.nelbo]) / micro_batches
        self.bins += torch.cat([loss.bin_nats, loss.bin_masked])
        if loss.block_nats is not None and loss.block_weight is not None:
            self.spread += spread_sums(loss.block_nats, loss.block_weight)

    def pack(self, scored: int, stop_asked: bool, still_saving: bool) -> Tensor:
        """One vector, to be added up over the ranks."""
        self._counts[0], self._counts[1], self._counts[2] = float(scored), float(stop_asked), float(still_saving)
        return torch.cat([self.means, self.spread, self._counts, self.bins, self.moments.flatten()])


@dataclass(frozen=True)
class Summed:
    """A packed vector that was added up over the ranks, taken apart; flags are those of any rank.

    loss, nelbo: nats per expected token. nats, masked: by masking rate. moments [3, TIME_BINS], empty without them.
    """

    loss: float
    nelbo: float
    spread: Spread
    scored: float
    stop_asked: bool
    still_saving: bool
    nats: list[float]
    masked: list[float]
    moments: Tensor

    @classmethod
    def unpack(cls, summed: Tensor) -> Summed:
        """Of a tensor on the host."""
        loss, nelbo, *rest = summed[: 8 + 2 * BINS].tolist()
        return cls(
            loss,
            nelbo,
            Spread(*rest[:3]),
            rest[3],
            rest[4] > 0,
            rest[5] > 0,
            rest[6 : 6 + BINS],
            rest[6 + BINS :],
            summed[8 + 2 * BINS :].view(3, -1),
        )
