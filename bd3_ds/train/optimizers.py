"""The optimizers that a recipe can name (optim.name). A new one is an entry here.

No torch at the top: names and facts are checked before it is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bd3_ds.config.registries import OPTIMIZERS, OptimizerKind

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bd3_ds.config.schema import OptimConfig

Groups = list[dict[str, Any]]  # each with its `params` and `weight_decay`


def _adamw(groups: Groups, optim: OptimConfig) -> Optimizer:
    import torch

    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def _adamw_on_host(groups: Groups, optim: OptimConfig) -> Optimizer:
    import deepspeed

    betas = (optim.beta1, optim.beta2)
    made: Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
        groups, lr=optim.lr, betas=betas, eps=optim.eps, adamw_mode=True
    )
    return made


OPTIMIZERS.register("adamw", OptimizerKind("AdamW", _adamw, ("exp_avg", "exp_avg_sq"), _adamw_on_host))
