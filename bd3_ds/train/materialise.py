"""Materialises a network from the meta device, one tensor at a time.

No rank ever holds the whole network in fp32: each tensor is made in the precision and on the device that it stays in,
and at ZeRO-3 divided among the ranks before the next is made. The fp32 masters take their part from the same source
later (`engine.Engine`).
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn


class WeightSource(Protocol):
    """A source of weights: any part of any tensor, any number of times."""

    def fill(self, name: str, start: int, into: Tensor) -> None:
        """Set the flat `into` [n], of any dtype and device, to elements start … start + n of the parameter `name`."""


class LoadedWeights:
    """Weights in memory, such as those of an export; memory-mapped files are read part by part."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self._weights = weights

    def fill(self, name: str, start: int, into: Tensor) -> None:
        """See `WeightSource`."""
        into.copy_(self._weights[name].flatten()[start : start + len(into)])


class PlaceholderZeros:
    """Zeros, in place of weights that a checkpoint fills later."""

    def fill(self, name: str, start: int, into: Tensor) -> None:
        """See `WeightSource`."""
        into.zero_()


@torch.no_grad()
def materialise(
    model: nn.Module,
    values: WeightSource,
    dtype: torch.dtype,
    device: torch.device,
    divide: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Replace the model's parameters by ones of `dtype` on `device`; `divide` then frees all but this rank's part."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            places[id(parameter)].append((module, key))  # a tied matrix has more than one
    for name, empty in list(model.named_parameters()):
        whole = torch.empty(empty.shape, dtype=dtype, device=device)
        values.fill(name, 0, whole.view(-1))
        real = nn.Parameter(whole)
        for module, key in places[id(empty)]:
            setattr(module, key, real)
        del whole
        if divide is not None:
            divide(real)


def return_freed() -> None:
    """Return freed memory to the system: glibc keeps blocks below 32 MiB, as most tensors are."""
    with suppress(OSError, AttributeError):  # another C library keeps less, or has no such function
        ctypes.CDLL(None).malloc_trim(0)
