"""An initialised network, and which of its weights decay."""

from __future__ import annotations

import math

import torch
from torch import nn

from bd3_ds.model.dit import DiT
from bd3_ds.model.network import network_of as network_of
from bd3_ds.model.norm import Norm


def initialise(model: DiT, seed: int) -> None:
    """Weights as the paper's recipe has them, each tensor from its own generator: a new tensor disturbs no other.

    Matrices uniform in +-1/sqrt(fan-in); conditioning and head zero, so that a new network starts from uniform
    predictions with every layer's residual closed. A tied matrix is an embedding, not zero.
    """
    with torch.no_grad():
        for order, (name, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(seed * 100_003 + order)
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Norm):
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "modulation" in name or name.startswith("head.linear"):
                parameter.zero_()
            else:
                matrix = owner.weight
                assert isinstance(matrix, torch.Tensor)
                bound = 1 / math.sqrt(matrix.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def without_decay(module: nn.Module) -> set[str]:
    """Names of parameters that weight decay leaves alone: norms, biases, embeddings."""
    embeddings = ("embed.", "positions.")  # a tied output matrix too: its name is the embedding's
    return {name for name, p in module.named_parameters() if p.dim() < 2 or name.startswith(embeddings)}
