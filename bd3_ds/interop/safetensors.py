"""Tensors of other programs: safetensors, whole or in shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a model's folder; raises UserError where there are none or one is missing."""
    files = [directory / WHOLE]
    if not files[0].is_file() and (directory / INDEX).is_file():
        content = read_json(directory / INDEX, "index of the weights")
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(n, str) and n == Path(n).name for n in shards.values()):
            raise UserError(f"{directory / INDEX} is no index of safetensors files; fetch it again")
        files = [directory / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            pickled = any(directory.glob("*.bin"))
            advice = "pickles (.bin) are not read, save the model as safetensors first" if pickled else "fetch it again"
            raise UserError(f"{file} not found; {advice}")
    return files


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder, on the CPU; raises UserError for files that are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in tensor_files(directory):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or no safetensors file ({error}); fetch it again") from None
    return tensors


def require_finite(
    weights: Mapping[str, Tensor], origin: str, advice: str = "take another checkpoint of the model"
) -> None:
    """Raise UserError for the first of the `weights` (from `origin`) that holds a number which is not finite."""
    import torch

    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{origin} holds weights that are not finite ({name}); {advice}")
