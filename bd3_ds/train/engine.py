"""Wraps DeepSpeed's engine: the only file of the trainer that calls it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from bd3_ds.checkpoint.shards import Shards, piece
from bd3_ds.config.ds_json import complete_ds_json, offloads, zero_stage
from bd3_ds.config.registries import OPTIMIZERS, values_of
from bd3_ds.config.schema import RunConfig
from bd3_ds.model.build import without_decay
from bd3_ds.runtime.world import World
from bd3_ds.train.masters import Masters, first_state
from bd3_ds.train.materialise import LoadedWeights, WeightSource, materialise, return_freed


class Engine:
    """A network under ZeRO: forward, backward, step, and this rank's share of weights and of the optimizer's state."""

    def __init__(
        self,
        model: nn.Module,
        run: RunConfig,
        ds_json: dict[str, Any],
        world: World,
        values: WeightSource | None = None,
    ):
        """For a model on the meta device, with weights from `values`, or for one that has its own."""
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that newer torch deprecates; nothing here can change that.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
        # Recomputed layers warn in passes without gradients, which the clip search makes.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        self.stage = zero_stage(ds_json)
        self.world = world
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        config = complete_ds_json(ds_json, run, world.size)
        no_decay = without_decay(model)  # at ZeRO-3 shapes cannot be seen later
        if values is not None:
            dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
            # With ZeRO++'s second copies DeepSpeed makes its groups itself, and divides what is whole.
            copies = int(ds_json.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))
            divide = _Division(config, dtype) if self.stage == 3 and copies == 1 else None
            materialise(model, values, dtype, world.device, divide)
        elif self.stage > 0:
            values = LoadedWeights({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        make = _maker(run, offloads(ds_json))
        first = first_state(make, run.optim.name, torch.device("cpu") if offloads(ds_json) else world.device)
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=make(_groups(model, no_decay, run.optim.weight_decay)), config=config
        )
        return_freed()  # the weights that DeepSpeed has laid side by side
        # Without ZeRO DeepSpeed keeps no fp32 master weights for bf16; there the weights are fp32 and autocast rounds.
        self._autocast = self.stage == 0 and run.train.precision == "bf16"
        self._norm: float | None = None
        self._refused = False
        self._watch_refusal()
        self.masters = Masters(self._deepspeed, self.stage, world, self.shapes, first)
        if self.stage > 0:
            assert values is not None
            # DeepSpeed makes its masters from weights that it has rounded to bf16.
            for group in self.masters.groups(write=True):
                for fragment in group:
                    values.fill(fragment.name, fragment.start, fragment.weights)
            self.masters.wrote()

    @property
    def module(self) -> nn.Module:
        """The network; under ZeRO-3 its parameters are empty between passes."""
        return self._deepspeed.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass."""
        with torch.autocast(self.world.device.type, torch.bfloat16) if self._autocast else nullcontext():
            return self._deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch's loss; DeepSpeed averages over micro-batches and ranks.

        Of a loss that is not finite, no gradient is either, so that no rank updates on it.
        """
        self._deepspeed.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))
        if self.stage == 0 and self._deepspeed.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = float(nn.utils.get_total_norm(gradients))

    def step(self, lr: float, refuse: bool = False) -> None:
        """After each micro-batch; the last one of an accumulation clips and updates with learning rate `lr`.

        There is no update where the gradient is not finite, nor where the last micro-batch comes with `refuse`.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        updates = self._deepspeed.is_gradient_accumulation_boundary()
        self._refused = refuse
        if self.stage == 0 and updates:
            self._refused = refuse or not math.isfinite(self.grad_norm())
        self._deepspeed.step()
        if self.stage > 0 and updates:
            self._refused = not self._deepspeed.was_step_applied()
            if self.stage == 3 and self._refused:
                self._deepspeed.optimizer.checkpoint_event_epilogue()  # gathers the small weights that stay whole

    @property
    def skipped(self) -> bool:
        """Whether the last accumulation ended without an update; the same on every rank."""
        return self._refused

    def grad_norm(self) -> float:
        """L2 norm of the last whole gradient, before clipping; not finite where the gradient is not."""
        norm = self._norm if self.stage == 0 else self._deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share, for a checkpoint."""
        for group in self.masters.groups():
            for fragment in group:
                for kind, values in fragment.tensors.items():
                    yield piece(kind, fragment.name, fragment.start), values

    def read(self, shards: Shards, updates: int) -> None:
        """Take this rank's share from a checkpoint, whatever ranks and ZeRO stage wrote it, after `updates` updates."""
        for group in self.masters.groups(write=True):
            for fragment in group:
                for kind, values in fragment.tensors.items():
                    shards.read(kind, fragment.name, fragment.start, values)
        self.masters.wrote(updates)

    def _watch_refusal(self) -> None:
        """Have DeepSpeed make no update that is refused."""
        if self.stage == 0:
            update = self._optimizer.step
            self._optimizer.step = lambda: None if self._refused else update()
            return
        # ZeRO skips an update whose gradient overflows; just before that check, what else to skip is set.
        zero = self._deepspeed.optimizer
        update_scale = zero._update_scale

        def look(overflow: bool = False) -> None:
            zero.overflow = zero.overflow or self._refused
            update_scale(zero.overflow)

        zero._update_scale = look


class _Division:
    """Divides parameters among the ranks as ZeRO-3 does with a whole model, one at a time."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype):
        self._config, self._dtype = config, dtype
        self._convert: Callable[..., None] | None = None

    def __call__(self, parameter: nn.Parameter) -> None:
        if self._convert is None:
            alone = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=alone, config_dict_or_path=self._config, dtype=self._dtype)
            self._convert = getattr(parameter, "convert_to_zero_parameters")  # noqa: B009 - set by DeepSpeed
        else:
            self._convert(param_list=[parameter])


def _maker(run: RunConfig, offload: bool) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """What makes the run's optimizer of parameter groups; `check_optimizer` has made sure that it can be offloaded."""
    kind = OPTIMIZERS[run.optim.name]
    make = kind.on_host if offload else kind.make
    assert make is not None
    return lambda groups: make(groups, run.optim, **values_of(kind.parameters, run.optim.parameters))


def _groups(model: nn.Module, no_decay: set[str], weight_decay: float) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name not in no_decay], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in no_decay], "weight_decay": 0.0},
    ]
