"""Asynchronous copies from the host to a device."""

from __future__ import annotations

from torch import Tensor, device


def send(tensor: Tensor, to: device) -> Tensor:
    """To the device, whose host does not wait for it; itself where it lies there."""
    if tensor.device == to:
        return tensor
    pinned = to.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(to, non_blocking=True)
