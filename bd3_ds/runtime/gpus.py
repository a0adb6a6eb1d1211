"""A table of GPUs: usable memory, the maker's dense bf16 rate, bandwidth of links."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_ds.runtime.errors import UserError, did_you_mean

GIB = 2**30
PER_NODE = 8  # GPUs of a node by default


@dataclass(frozen=True)
class Gpu:
    """`driver` is a part of the name that the driver gives; memory in bytes, peak_bf16 in FLOP/s.

    `link`: bytes a second and direction to the others in its node, by NVLink where the board has it, else by PCIe.
    """

    name: str
    driver: str
    memory: float
    peak_bf16: float
    link: float


PCIE4, PCIE5 = 25, 50  # GB/s a direction that 16 lanes carry
# In the order in which driver names are tried: a longer name stands before the one that it holds. Memory is about what
# torch reports, less than the name says: the driver and error correction keep some.
GPUS = tuple(
    Gpu(name, driver, gib * GIB, teraflops * 1e12, link * 1e9)
    for name, driver, gib, teraflops, link in (
        ("b200-180g", "B200", 178, 2250, 900),
        ("h200-141g", "H200", 139, 989, 450),
        ("h100-pcie-80g", "H100 PCIe", 79, 756, PCIE5),
        ("h100-nvl-94g", "H100 NVL", 93, 835, PCIE5),
        ("h100-80g", "H100", 79, 989, 450),
        ("a100-40g", "A100-SXM4-40GB", 39, 312, 300),
        ("a100-pcie-40g", "A100-PCIE-40GB", 39, 312, PCIE4),
        ("a100-pcie-80g", "A100 80GB PCIe", 79, 312, PCIE4),
        ("a100-80g", "A100", 79, 312, 300),
        ("a800-80g", "A800", 79, 312, 200),
        ("h800-80g", "H800", 79, 989, 200),
        ("l40s-48g", "L40S", 44, 362, PCIE4),
        ("l40-48g", "L40", 44, 181, PCIE4),
        ("l4-24g", "L4", 22, 121, PCIE4),
        ("a6000-48g", "A6000", 47, 155, PCIE4),
        ("a10g-24g", "A10G", 22, 70, PCIE4),
        ("a10-24g", "A10", 22, 125, PCIE4),
        ("rtx4090-24g", "4090", 23, 165, PCIE4),
        ("rtx3090-24g", "3090", 23, 71, PCIE4),
    )
)


def find_gpu(name: str, option: str) -> Gpu:
    """The GPU called `name`; raises UserError with the nearest known name."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise UserError(f"{option}={name} is unknown; {did_you_mean(name.lower(), [gpu.name for gpu in GPUS])}")


def gpu_of_driver(name: str) -> Gpu | None:
    """The GPU that the driver calls `name`, if it is known."""
    return next((gpu for gpu in GPUS if gpu.driver in name), None)
