"""The only door through which a network learns that it is trained at scale; the network itself knows one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from bd3_ds.config.schema import TrainConfig
from bd3_ds.model.dit import DiT
from bd3_ds.model.layers import Layer
from bd3_ds.parallel.sequence import Sequence
from bd3_ds.runtime.world import World


def prepare_layers(model: DiT, train: TrainConfig) -> DiT:
    """Compile each layer and compute parts of it again in the backward pass, as the run says.

    activation_checkpointing `full` keeps a layer's input alone; `selective` all but what the MLP makes inside, whose
    activations are the widest of a layer.
    """
    if train.compile:
        from deepspeed.utils import set_z3_leaf_modules

        # ZeRO-3 gathers weights by hooks, which the compiler would follow and not understand. A leaf has them around
        # itself alone: the weights of a layer come and go together.
        set_z3_leaf_modules(model, [Layer])
    layers: Iterable[Any] = model.layers
    for layer in layers:
        if train.compile:
            _keep_out(layer)
        if train.activation_checkpointing == "selective":
            # The compiler cannot look into recomputation; its inside is compiled on its own.
            mix = _recomputed(torch.compile(layer.mix) if train.compile else layer.mix)
            layer.mix = torch.compiler.disable(mix) if train.compile else mix
        if train.compile:  # layer by layer: all have one shape, so that the first one's code serves the rest
            layer.forward = torch.compile(layer.forward)
        if train.activation_checkpointing == "full":
            layer.forward = _recomputed(layer.forward)
    return model


def share_sequences(model: DiT, train: TrainConfig, world: World) -> Sequence | None:
    """Have the model work on this rank's part of each sequence, if the run says so; None where it has all of it.

    Before `prepare_layers`, which looks at what stands for attention.
    """
    if train.sequence_parallel == 1:
        return None
    sequence = Sequence(world, train.sequence_parallel)
    sequence.apply(model)
    return sequence


def _keep_out(layer: Any) -> None:
    """What the compiler must not look into: a mask is no tensor and stripes are a loop over it; flex is compiled on its
    own. Dropout on CPUs draws its words outside as well, so that compiled layers drop what others drop.
    """
    layer.attend = torch.compiler.disable(layer.attend)
    if not torch.cuda.is_available():
        layer.drop = torch.compiler.disable(layer.drop)


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Reentrant, because ZeRO-3 frees a layer's weights between forward and backward, and the non-reentrant form
    compares the freed weights' shapes with the gathered ones.
    """
    return partial(checkpoint, function, use_reentrant=True)
