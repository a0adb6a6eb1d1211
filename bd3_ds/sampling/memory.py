"""The memory that sampling needs, estimated beforehand and compared with what is free."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bd3_ds.model.dit_config import DiTConfig
from bd3_ds.runtime.errors import UserError

KEPT = 24  # bytes of a token's id, order and probability, for as long as its text is not written out
PASSING = 24  # and of what is made beside them when a text ends
JSON = 280  # bytes of a token in what `run.py sample --json` writes: Python's objects, and the file beside them
SPARE = 0.9  # of what is free; the rest is for the network's own passes


def memory_needed(
    network: DiTConfig, num: int, length: int, batch: int, window: int, element_bytes: int, as_json: bool = False
) -> int:
    """Bytes that `num` texts of `length` tokens take, drawn `batch` at a time in a window of `window` tokens.

    The texts and the keys and values that are kept of them; what one pass of the network takes is not in it.
    """
    together = min(num, batch)
    texts = num * length * (KEPT * (2 if num > batch else 1) + (JSON if as_json else 0))  # parts are put together
    cache = 2 * network.layers * network.key_heads * network.head_width * element_bytes * min(window, length)
    return texts + together * (length * PASSING + cache)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a network on `device` draws."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def require_memory(needed: Callable[[int], int], free: int, num: int, length: int) -> None:
    """Raise UserError where `num` texts of `length` tokens do not fit into `free` bytes.

    `needed`: bytes by the length; the sentence names one that fits, the longest of length / 2, length / 4, …
    """
    if needed(length) <= SPARE * free:
        return
    fits = length // 2
    while fits > 1 and needed(fits) > SPARE * free:
        fits //= 2
    shorter = f"length={fits} fits, or fewer" if needed(max(1, fits)) <= SPARE * free else "draw fewer"
    raise UserError(
        f"length={length} for num={num} takes about {needed(length) / 2**30:,.1f} GiB beside the model, more than "
        f"{SPARE:.0%} of the {free / 2**30:,.1f} GiB that are free; {shorter} texts at once (num, batch)"
    )
