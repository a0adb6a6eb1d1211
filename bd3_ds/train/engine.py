"""The DeepSpeed seam: the only file of the trainer that calls deepspeed."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from bd3_ds.checkpoint.shards import Shards, piece
from bd3_ds.config.ds_json import complete_ds_json, zero_stage
from bd3_ds.config.schema import RunConfig
from bd3_ds.model.build import without_decay
from bd3_ds.runtime.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by torch's names


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter: elements start … start + n of the flat tensor, each element on one rank only.

    weights, and Adam's moments exp_avg and exp_avg_sq: [n] in fp32. They are live: written to, they are the engine's.
    """

    name: str
    start: int
    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Engine:
    """A network under ZeRO: forward, backward, step, and this rank's share of weights and moments."""

    def __init__(self, model: nn.Module, run: RunConfig, ds_json: dict[str, Any], world: World):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that newer torch wants to rename; nothing of ours to mend.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
        # Recomputed layers warn in passes without gradients, which the clip search makes.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        self.stage = zero_stage(ds_json)
        self.world = world
        self.clip = run.optim.clip
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        started = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        offload = "offload_optimizer" in ds_json.get("zero_optimization", {})
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(model, run, offload),
            config=complete_ds_json(ds_json, run, world.size),
        )
        # Without ZeRO DeepSpeed keeps no fp32 master weights for bf16; there the weights are fp32 and autocast rounds.
        self._autocast = self.stage == 0 and run.train.precision == "bf16"
        self._norm: float | None = None
        self._refused = False
        self._make_moments()
        self._watch_refusal()
        if self.stage > 0:
            # DeepSpeed makes its masters from weights that it has rounded to bf16.
            for fragment in self.fragments():
                end = fragment.start + len(fragment.weights)
                fragment.weights.copy_(started[fragment.name].flatten()[fragment.start : end])
            self.wrote()

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
        self._refused = refuse
        if self.stage == 0 and self._deepspeed.is_gradient_accumulation_boundary():
            self._refused = refuse or not math.isfinite(self.grad_norm())
        self._deepspeed.step()
        if self.stage > 0:
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

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the fp32 master weights and of Adam's moments."""
        for name, parameter in self.module.named_parameters():
            if self.stage == 0:
                if self.world.is_main:
                    yield self._fragment(name, 0, parameter, 0, parameter.numel())
            elif self.stage == 3:
                zero = self._deepspeed.optimizer
                group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
                start = self.world.rank * numel
                real = min(numel, self.shapes[name].numel() - start)  # the last parts are padded
                if real > 0:
                    yield self._fragment(name, start, zero.fp32_partitioned_groups_flat[group], offset, real)
            elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                flat = self._deepspeed.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                place = mapping.hp_fragment_address
                yield self._fragment(name, mapping.lp_fragment_address.start, flat, place.start, place.numel)

    def _fragment(self, name: str, start: int, flat: Tensor, offset: int, numel: int) -> Fragment:
        moments = self._adam.state[flat]
        parts = (whole.data.flatten()[offset : offset + numel] for whole in (flat, *(moments[key] for key in MOMENTS)))
        return Fragment(name, start, *parts)

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share, for a checkpoint."""
        for fragment in self.fragments():
            for kind in ("weights", *MOMENTS):
                yield piece(kind, fragment.name, fragment.start), getattr(fragment, kind)

    def read(self, shards: Shards, updates: int) -> None:
        """Take this rank's share from a checkpoint, whatever ranks and ZeRO stage wrote it, after `updates` updates."""
        for fragment in self.fragments():
            for kind in ("weights", *MOMENTS):
                shards.read(kind, fragment.name, fragment.start, getattr(fragment, kind))
        self.wrote(updates)

    @property
    def updates(self) -> int:
        """Updates that Adam's moments have seen; skipped steps are not among them."""
        return max((int(self._adam.state[flat]["step"]) for flat in self._flats()), default=0)

    def wrote(self, updates: int | None = None) -> None:
        """Call on all ranks after writing to fragments, with the `updates` that the moments written have seen.

        The weights that the passes use then follow the fp32 masters.
        """
        if updates is not None:
            for flat in self._flats():
                step = self._adam.state[flat]["step"]
                self._adam.state[flat]["step"] = torch.full_like(step, updates) if torch.is_tensor(step) else updates
        zero = self._deepspeed.optimizer
        if self.stage == 0 and self.world.size > 1:
            for parameter in self.module.parameters():
                for tensor in (parameter.data, *(self._adam.state[parameter][key] for key in MOMENTS)):
                    torch.distributed.broadcast(tensor, 0)
        elif self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            zero.checkpoint_event_prologue()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer that holds the moments; under ZeRO it lies inside DeepSpeed's own."""
        return self._optimizer if self.stage == 0 else self._deepspeed.optimizer.optimizer

    def _flats(self) -> list[Tensor]:
        """The fp32 tensors that Adam updates on this rank: parameters, or ZeRO's flat partitions of them."""
        if self.stage == 0:
            return list(self.module.parameters())
        zero = self._deepspeed.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _make_moments(self) -> None:
        """Make now what Adam makes at its first update, so that a checkpoint can be read into it."""
        on_host = isinstance(self._adam, deepspeed.ops.adam.DeepSpeedCPUAdam)
        for flat in self._flats():
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            step: Any = 0 if on_host else torch.zeros((), device=flat.device)
            self._adam.state[flat] = {"step": step, **moments}

    def _watch_refusal(self) -> None:
        """Have DeepSpeed make no update that is refused."""
        if self.stage == 0:
            update = self._optimizer.step
            self._optimizer.step = lambda: None if self._refused else update()
            return
        # ZeRO skips an update whose gradient overflows; just before it looks, it is told what else to skip.
        zero = self._deepspeed.optimizer
        update_scale = zero._update_scale

        def look(overflow: bool = False) -> None:
            zero.overflow = zero.overflow or self._refused
            update_scale(zero.overflow)

        zero._update_scale = look


def _adamw(model: nn.Module, run: RunConfig, offload: bool) -> torch.optim.Optimizer:
    optim = run.optim
    spared = without_decay(model)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name not in spared], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
    ]
    common: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if offload:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=True, **common)
