"""Weight initialisation, and the parameters that weight decay excludes."""

from __future__ import annotations

import math

import torch
from torch import nn

from bd3_ds.model.dit import DiT
from bd3_ds.model.dit_config import dit_config as dit_config
from bd3_ds.model.norm import Norm

CHUNK = 2**20  # numbers drawn at a time, so that no second copy of a whole tensor is held


class Initializer:
    """Initializer weights by the paper's recipe, any part of any tensor, without materialising the network.

    Each tensor has its own generator: adding a tensor changes no other. Matrices are uniform in +-1/sqrt(fan-in);
    conditioning and head zero, so that a new network starts from uniform predictions with every layer's residual
    closed. A tied matrix is an embedding, not zero.
    """

    def __init__(self, model: DiT, seed: int):
        """For a model, which may be on the meta device."""
        self._seed = seed
        self._constants: dict[str, float] = {}
        self._bounds: dict[str, tuple[int, float]] = {}
        for order, (name, _) in enumerate(model.named_parameters()):
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Norm):
                self._constants[name] = 0.0 if name.endswith("bias") else 1.0
            elif "modulation" in name or name.startswith("head.linear"):
                self._constants[name] = 0.0
            else:
                matrix = owner.weight
                assert isinstance(matrix, torch.Tensor)
                self._bounds[name] = order, 1 / math.sqrt(matrix.shape[1])

    @torch.no_grad()
    def fill(self, name: str, start: int, into: torch.Tensor) -> None:
        """Set the flat `into` [n], of any dtype and device, to elements start … start + n of the parameter `name`."""
        if name in self._constants:
            into.fill_(self._constants[name])
            return
        order, bound = self._bounds[name]
        generator = torch.Generator().manual_seed(self._seed * 100_003 + order)
        end = start + len(into)
        for first in range(0, end, CHUNK):  # the generator cannot skip: what lies before is drawn too
            drawn = torch.empty(min(CHUNK, end - first)).uniform_(-bound, bound, generator=generator)
            if first + len(drawn) > start:
                drawn = drawn[max(0, start - first) :]
                place = max(first, start) - start
                into[place : place + len(drawn)].copy_(drawn)


def initialise(model: DiT, seed: int) -> None:
    """Set all weights of a model by `Initializer`."""
    initial = Initializer(model, seed)
    for name, parameter in model.named_parameters():
        initial.fill(name, 0, parameter.detach().view(-1))


def without_decay(module: nn.Module) -> set[str]:
    """Names of parameters excluded from weight decay: norms, biases, embeddings."""
    embeddings = ("embed.", "positions.")  # a tied output matrix too: its name is the embedding's
    return {name for name, p in module.named_parameters() if p.dim() < 2 or name.startswith(embeddings)}
