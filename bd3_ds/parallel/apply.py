"""The only door through which a network learns that it is trained at scale; the network itself knows one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from bd3_ds.config.schema import TrainConfig
from bd3_ds.model.dit import DiT


def prepare_layers(model: DiT, train: TrainConfig) -> DiT:
    """Compile each layer and compute parts of it again in the backward pass, as the run says.

    activation_checkpointing `full` keeps a layer's input alone; `selective` all but what the MLP makes inside, whose
    activations are the widest of a layer.
    """
    layers: Iterable[Any] = model.layers
    for layer in layers:
        if train.activation_checkpointing == "selective":
            layer.mix = _recomputed(_compiled(layer.mix) if train.compile else layer.mix)
        if train.compile:
            layer.forward = _compiled(layer.forward)
        if train.activation_checkpointing == "full":
            layer.forward = _recomputed(layer.forward)
    return model


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Layer by layer, since all have one shape: the first one's code serves the rest."""
    return torch.compile(function)


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Reentrant, because ZeRO-3 frees a layer's weights between forward and backward, and the non-reentrant form
    compares the freed weights' shapes with the gathered ones. The compiler cannot look into it and goes around.
    """
    return torch.compiler.disable(partial(checkpoint, function, use_reentrant=True))
