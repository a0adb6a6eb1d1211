"""The only door through which a network learns that it is trained at scale; the network itself knows one device."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from bd3_ds.config.schema import TrainConfig
from bd3_ds.model.dit import DiT
from bd3_ds.parallel.sequence import Sequence
from bd3_ds.runtime.world import World


def recompute_layers(model: DiT, train: TrainConfig) -> DiT:
    """Keep each layer's input alone and compute its inside again in the backward pass, if the run says so.

    Reentrant, because ZeRO-3 frees a layer's weights between forward and backward, and the non-reentrant form compares
    the freed weights' shapes with the gathered ones.
    """
    if train.activation_checkpointing == "full":
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=True)
    return model


def share_sequences(model: DiT, train: TrainConfig, world: World) -> Sequence | None:
    """Have the model work on this rank's part of each sequence, if the run says so; None where it has all of it."""
    if train.sequence_parallel == 1:
        return None
    sequence = Sequence(world, train.sequence_parallel)
    sequence.apply(model)
    return sequence
