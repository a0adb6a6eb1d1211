"""From configuration to an initialised network."""

from __future__ import annotations

import math

import torch
from torch import nn

from bd3_ds.config.schema import AR, ModelConfig
from bd3_ds.model.dit import DiT, Network
from bd3_ds.model.layers import Norm
from bd3_ds.runtime.errors import UserError


def network_of(model: ModelConfig, objective: str) -> Network:
    """The network that a complete model section (vocabulary known) and an objective ask for."""
    if model.vocab_size is None:
        raise UserError("model.vocab_size is not set; it comes from the data's tokenizer or from the export")
    return Network(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=model.layers,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        cond_size=model.cond_size,
        causal=objective == AR,
        dropout=model.dropout,
        rope_base=model.rope_base,
        attention=model.attention,
        vocab_multiple=model.vocab_multiple,
    )


def initialise(model: DiT, seed: int) -> None:
    """Weights as the paper's recipe has them, each tensor from its own generator: a new tensor disturbs no other.

    Matrices uniform in +-1/sqrt(fan-in); conditioning and head zero, so that a new network starts from uniform
    predictions with every layer's residual closed.
    """
    with torch.no_grad():
        for order, (name, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator().manual_seed(seed * 100_003 + order)
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Norm):
                parameter.fill_(1.0)
            elif "modulation" in name or name.startswith("head.linear"):
                parameter.zero_()
            else:
                matrix = owner.weight
                assert isinstance(matrix, torch.Tensor)
                bound = 1 / math.sqrt(matrix.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def without_decay(module: nn.Module) -> set[str]:
    """Names of parameters that weight decay leaves alone: norms, biases, embeddings."""
    return {name for name, p in module.named_parameters() if p.dim() < 2 or name.startswith("embed")}
