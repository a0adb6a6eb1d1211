"""The DeepSpeed seam: the only file of the trainer that calls deepspeed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from bd3_ds.config.ds_json import complete_ds_json, zero_stage
from bd3_ds.config.schema import RunConfig
from bd3_ds.model.build import without_decay
from bd3_ds.runtime.world import World


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter's fp32 master values: elements start … start + len(values) of the flat tensor."""

    name: str
    start: int
    values: Tensor


class Engine:
    """A network under ZeRO: forward, backward, step, sharded save and load."""

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
        offload = "offload_optimizer" in ds_json.get("zero_optimization", {})
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(model, run, offload),
            config=complete_ds_json(ds_json, run, world.size),
        )
        # Without ZeRO DeepSpeed keeps no fp32 master weights for bf16; there the weights are fp32 and autocast rounds.
        self._autocast = self.stage == 0 and run.train.precision == "bf16"
        self._norm: float | None = None

    @property
    def module(self) -> nn.Module:
        """The network; under ZeRO-3 its parameters are empty between passes."""
        return self._deepspeed.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass."""
        with torch.autocast(self.world.device.type, torch.bfloat16) if self._autocast else nullcontext():
            return self._deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch's loss; DeepSpeed averages over micro-batches and ranks."""
        self._deepspeed.backward(loss)
        if self.stage == 0 and self._deepspeed.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = float(nn.utils.get_total_norm(gradients))

    def step(self, lr: float) -> None:
        """After each micro-batch; the last one of an accumulation clips and updates with learning rate `lr`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()

    def grad_norm(self) -> float:
        """L2 norm of the last update's whole gradient, before clipping."""
        norm = self._norm if self.stage == 0 else self._deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the fp32 master weights, each element on one rank only. The values are live."""
        for name, parameter in self.module.named_parameters():
            if self.stage == 0:
                if self.world.is_main:
                    yield Fragment(name, 0, parameter.data.flatten())
            elif self.stage == 3:
                part = safe_get_local_fp32_param(parameter).flatten()
                start = self.world.rank * part.numel()
                real = min(part.numel(), self.shapes[name].numel() - start)
                if real > 0:
                    yield Fragment(name, start, part[:real])
            elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                yield Fragment(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment().flatten())

    def save(self, directory: Path, tag: str) -> None:
        """Write this rank's shards into directory/tag; committing them is the caller's business."""
        self._deepspeed.save_checkpoint(str(directory), tag=tag, save_latest=False)

    def load(self, directory: Path, tag: str) -> None:
        """Read what `save` wrote, on the same number of ranks."""
        path, _ = self._deepspeed.load_checkpoint(str(directory), tag=tag)
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load {directory / tag}")


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
