"""The exponential moving average of the weights, held in shards: each rank averages the master weights that it owns.

Memory per rank is 4 bytes x parameters / world size under ZeRO >= 1, never a whole copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bd3_ds.checkpoint.shards import Shards, piece
from bd3_ds.runtime.world import World
from bd3_ds.train.engine import Engine

KIND = "ema"  # of its pieces in a checkpoint


class Ema:
    """Average of the engine's fp32 master weights, with the warm-up min(decay, (1 + n) / (10 + n)) over updates n."""

    def __init__(self, engine: Engine, decay: float):
        self.decay = decay
        self.updates = 0
        self._engine = engine
        self._parts = [(f.name, f.start, f.weights.clone()) for group in engine.masters.groups() for f in group]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present weights; after every update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = (average for _, _, average in self._parts)
        for group in self._engine.masters.groups():
            if group:  # without ZeRO the main rank holds all
                values = [fragment.weights for fragment in group]
                torch._foreach_lerp_(list(itertools.islice(averages, len(group))), values, 1 - decay)

    def gather(self, world: World) -> dict[str, Tensor]:
        """The whole averaged weights on the main rank, on the CPU; other ranks get an empty dictionary."""
        parts = {name: (start, average) for name, start, average in self._parts}
        whole = {}
        for name, shape in self._engine.shapes.items():
            tensor = torch.zeros(shape.numel(), device=world.device)
            if name in parts:
                start, average = parts[name]
                tensor[start : start + average.numel()] = average
            world.all_reduce(tensor)
            if world.is_main:
                whole[name] = tensor.view(shape).cpu()
        return whole

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part, for a checkpoint."""
        for name, start, average in self._parts:
            yield piece(KIND, name, start), average

    def read(self, shards: Shards, updates: int) -> None:
        """Fill this rank's part from a checkpoint, whatever ranks wrote it, after `updates` updates."""
        self.updates = updates
        for name, start, average in self._parts:
            shards.read(KIND, name, start, average)
