"""Hardware checks: settings that this machine cannot serve are refused before the run starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from bd3_ds.config.registries import ATTENTION, AUTO_ATTENTION
from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.errors import UserError


def check_hardware(run: RunConfig, ds_json: dict[str, Any] | None = None) -> None:
    """Raises UserError where the run, or its checked DeepSpeed JSON, asks for what the machine does not have."""
    device, asked = "cuda" if torch.cuda.is_available() else "cpu", run.model.attention
    if asked in ATTENTION and device not in ATTENTION[asked].trains_on:
        able = [AUTO_ATTENTION, *sorted(name for name in ATTENTION if device in ATTENTION[name].trains_on)]
        where = "a GPU" if device == "cuda" else "CPUs"
        raise UserError(f"model.attention={asked} does not train on {where}; use {', '.join(able[:-1])} or {able[-1]}")
    if run.train.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("train.precision=bf16 is not supported by this GPU; use fp32")
    if problems := list(_zero(ds_json or {})):
        raise UserError(*problems)


def _zero(ds_json: dict[str, Any]) -> Iterator[str]:
    zero = ds_json.get("zero_optimization", {})
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        # The kernels are CUDA's. Without them weights end in a traceback, gradients are silently sent unquantized.
        if zero.get(key) and not torch.cuda.is_available():
            yield (
                f"zero_optimization.{key} in the DeepSpeed JSON needs DeepSpeed's quantizer, which has no CPU version; "
                "set it to false, or use ds_configs/zero3.json"
            )
    devices = {zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    if "nvme" in devices and not async_io_is_there():
        yield (
            "offloading to NVMe needs libaio, which this machine lacks; install libaio-dev (apt) or libaio-devel (yum) "
            "or use ds_configs/zero3_offload.json"
        )
    if ds_json.get("aio", {}).get("use_gds") and not torch.cuda.is_available():
        yield "aio.use_gds in the DeepSpeed JSON reads from disk into GPUs, and this machine has none; leave it out"


def async_io_is_there() -> bool:
    """Whether DeepSpeed's operator for asynchronous disk access, which it compiles on first use, finds its library."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())
