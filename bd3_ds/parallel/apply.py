"""Applies compilation, activation checkpointing and sequence parallelism to a network, which itself has none of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from bd3_ds.config.schema import TrainConfig
from bd3_ds.model.dit import DiT
from bd3_ds.model.layers import Layer
from bd3_ds.parallel.sequence import SequenceParallel
from bd3_ds.runtime.world import World


def prepare_layers(model: DiT, train: TrainConfig) -> DiT:
    """Compile each layer and recompute parts of it in the backward pass, as configured.

    activation_checkpointing `full` stores only a layer's input; `selective` all but the MLP's inner activations, the
    widest of a layer.
    """
    if train.compile:
        from deepspeed.utils import set_z3_leaf_modules

        # ZeRO-3 gathers weights in hooks, which the compiler cannot trace. A leaf module has them only around itself:
        # the weights of a layer are gathered and freed together.
        set_z3_leaf_modules(model, [Layer])
    layers: Iterable[Any] = model.layers
    for layer in layers:
        if train.compile:
            _exclude_from_compilation(layer)
        if train.activation_checkpointing == "selective":
            # The compiler cannot trace checkpointing; what is checkpointed is compiled by itself.
            mix = _checkpointed(torch.compile(layer.mix) if train.compile else layer.mix)
            layer.mix = torch.compiler.disable(mix) if train.compile else mix
        if train.compile:  # per layer: all have one shape, so that the code of the first serves all
            layer.forward = torch.compile(layer.forward)
        if train.activation_checkpointing == "full":
            layer.forward = _checkpointed(layer.forward)
    return model


def apply_sequence_parallelism(model: DiT, train: TrainConfig, world: World) -> SequenceParallel | None:
    """Slice each sequence among ranks, if configured; None where each rank has whole sequences.

    Call it before `prepare_layers`, which wraps the layers' attention.
    """
    if train.sequence_parallel == 1:
        return None
    sequence = SequenceParallel(world, train.sequence_parallel)
    sequence.apply(model)
    return sequence


def _exclude_from_compilation(layer: Any) -> None:
    """Attention is not compiled with the layer: a mask is no tensor and stripes are a loop over it; flex is compiled by
    itself. Dropout on CPUs is not either, so that compiled layers drop the same elements as others.
    """
    layer.attend = torch.compiler.disable(layer.attend)
    if not torch.cuda.is_available():
        layer.drop = torch.compiler.disable(layer.drop)


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Reentrant, because ZeRO-3 frees a layer's weights between forward and backward, and the non-reentrant form
    compares the freed weights' shapes with the gathered ones.
    """
    return partial(checkpoint, function, use_reentrant=True)
