"""What callers hand to the Python API, as tensors, or a UserError that says what would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_ds.runtime.errors import UserError

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


def token_ids(
    name: str, value: Any, vocab_size: int, longest: int, device: torch.device, one_row: bool = False
) -> Tensor:
    """`value` as ids [rows, tokens] int64 on `device`, each in 0 … vocab_size - 1, at most `longest` a row.

    With `one_row`, [tokens] stands for [1, tokens].
    """
    try:
        ids = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be read as a tensor of token ids ({error})") from None
    if one_row and ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.numel() == 0:
        raise UserError(f"{name} has shape {list(ids.shape)}; it must be [rows, tokens], neither of them 0")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise UserError(f"{name} is {ids.dtype}; token ids are integers, such as torch.long")
    for extreme in (int(ids.min()), int(ids.max())):
        if not 0 <= extreme < vocab_size:
            raise UserError(f"{name} holds id {extreme}; ids of this model lie in 0 … {vocab_size - 1}")
    if ids.shape[1] > longest:
        raise UserError(f"{name} has {ids.shape[1]} tokens a row; the model was trained with {longest} (data.length)")
    return ids.long()


def noise_levels(sigma: Tensor | Sequence[float] | None, rows: int, device: torch.device) -> Tensor:
    """SEDD's sigma as [rows] fp32 on `device`."""
    if sigma is None:
        raise UserError("sigma is missing: a SEDD network takes the noise level of each row, sigma=[B]")
    levels = torch.as_tensor(sigma, device=device, dtype=torch.float32)
    if levels.shape != (rows,):
        raise UserError(f"sigma has shape {list(levels.shape)}; it must be [{rows}], one noise level a row")
    return levels


def check_sampling(num: int, length: int, longest: int, seed: int, temperature: float, nucleus: float | None) -> None:
    """Raise UserError for the first number that sampling cannot work with."""
    if num < 1:
        raise UserError(f"num={num} must be at least 1")
    if not 1 <= length <= longest:
        raise UserError(f"length={length} must lie in 1 … {longest}, the length that the model was trained with")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature} must be 0 (the most likely token) or more, such as 1.0")
    if nucleus is not None and not 0 < nucleus <= 1:
        raise UserError(f"nucleus={nucleus} must lie in (0, 1], such as 0.9")
    check_seed(seed)


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that no generator takes."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be a whole number from 0 to 2^63 - 1")


def usable_device(device: str | torch.device) -> torch.device:
    """The torch device of this name; raises UserError where it is not there."""
    try:
        opened = torch.device(device)
        torch.empty(0, device=opened)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"device={device} cannot be used ({reason}); 'cpu' always can") from None
    return opened
