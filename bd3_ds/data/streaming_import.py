"""Imports mosaicml-streaming with workarounds for machines without a GPU and for DeepSpeed's launcher."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

from bd3_ds.runtime.slurm import ranks_of_host

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: Any = None


def import_streaming() -> ModuleType:
    """Import and return the module `streaming`; the first call takes seconds.

    Sets LOCAL_WORLD_SIZE, which streaming reads, from LOCAL_SIZE, which DeepSpeed's launcher sets.
    """
    if "LOCAL_SIZE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks_of_host(os.environ))
    stub_torchvision()
    import streaming

    return streaming


def stub_torchvision() -> None:
    """Make torchvision importable beside a CPU-only torch; transformers' models need this too."""
    # streaming imports torchvision, which beside a CPU-only torch stops at the first operator of its missing library.
    # Nothing of ours calls these operators, so declaring them is enough.
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torch

        _library = torch.library.Library("torchvision", "DEF")  # dropped operators vanish: keep the object alive
        for schema in _OPERATORS:
            _library.define(schema)
