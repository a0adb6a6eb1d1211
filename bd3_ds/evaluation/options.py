"""Values of the evaluation commands' options, checked before anything slow is loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bd3_ds.runtime.cli import at_least_one
from bd3_ds.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C


def number_of_chunks(text: str) -> int:
    """argparse type: a whole number above 0, or `all`."""
    return sys.maxsize if text == "all" else at_least_one(text)


def open_device(name: str | None) -> torch.device:
    """The device that --device names, or the GPU where there is one for None; raises UserError for a GPU not there.

    A command that computes on the CPU keeps the memory of freed tensors from here on.
    """
    import torch

    from bd3_ds.runtime.allocator import keep_freed_memory

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        keep_freed_memory()
    return device
