"""Settings that this machine cannot serve are refused with a sentence before the run starts."""

from __future__ import annotations

import torch

from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.errors import UserError


def check_hardware(run: RunConfig) -> None:
    """Raises UserError where the run asks for what the device does not have."""
    if run.model.attention == "flex" and not torch.cuda.is_available():
        raise UserError("model.attention=flex has no backward pass on CPUs; use auto, stripes or sdpa")
    if run.model.attention == "stripes" and torch.cuda.is_available():
        raise UserError("model.attention=stripes is for CPUs; use auto or flex on a GPU")
    if run.train.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("train.precision=bf16 is not supported by this GPU; use fp32")
