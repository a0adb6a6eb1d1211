"""Argument parsing of the Python API: tensors, or a UserError that says what to pass instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeGuard

import torch
from torch import Tensor

from bd3_ds.runtime.errors import UserError, did_you_mean
from bd3_ds.sampling.options import Options

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]
Prompt = str | Sequence[str] | Ids | None

TEXTS = 4  # sampled by default


def token_ids(
    name: str, value: Any, vocab_size: int, longest: int | None, device: torch.device, one_row: bool = False
) -> Tensor:
    """`value` as ids [rows, tokens] int64 on `device`, each in 0 … vocab_size - 1, at most `longest` a row (None: any).

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
    if longest is not None and ids.shape[1] > longest:
        raise UserError(f"{name} has {ids.shape[1]} tokens a row; the model was trained with {longest} (data.length)")
    return ids.long()


def positions_to_score(scored: Any, x0: Tensor, mask_id: int, block_size: int) -> Tensor:
    """Which of the ids x0 [B, L] are scored, boolean [B, L] on their device; None stands for all but position 0.

    Raises UserError where nothing is, where position 0 or a mask id is, and where a mask id stands in a block before
    one that is.
    """
    if scored is None:
        positions = torch.ones_like(x0, dtype=torch.bool)
        positions[:, 0] = False
    else:
        try:
            positions = torch.as_tensor(scored, device=x0.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"scored cannot be read as a tensor of booleans ({error})") from None
        if positions.dtype != torch.bool or positions.shape != x0.shape:
            raise UserError(
                f"scored is {positions.dtype} of shape {list(positions.shape)}; it must be boolean, one for each of "
                f"tokens {list(x0.shape)}"
            )
    if bool(positions[:, 0].any()):
        raise UserError("scored is true at position 0, which is given, usually BOS; make scored[:, 0] false")
    if not bool(positions.any()):
        why = "position 0 is given" if scored is None else "scored is false everywhere"
        raise UserError(f"tokens of length {x0.shape[1]} have nothing to score: {why}")
    masked = x0 == mask_id
    if bool((masked & positions).any()):
        raise UserError(f"tokens hold the mask id {mask_id} where they are to be scored; only clean text has a score")
    block = torch.arange(x0.shape[1], device=x0.device) // block_size
    last_scored = torch.where(positions, block, -1).max(1, keepdim=True).values  # [B, 1]
    if bool((masked & (block < last_scored)).any()):
        raise UserError(
            f"tokens hold the mask id {mask_id} in a block of {block_size} before one that is scored, which reads it "
            "as text; it may stand in a row's last scored block and behind"
        )
    return positions


def noise_levels(sigma: Tensor | Sequence[float] | None, rows: int, device: torch.device) -> Tensor:
    """SEDD's sigma as [rows] fp32 on `device`."""
    if sigma is None:
        raise UserError("sigma is missing: a SEDD network takes the noise level of each row, sigma=[B]")
    levels = torch.as_tensor(sigma, device=device, dtype=torch.float32)
    if levels.shape != (rows,):
        raise UserError(f"sigma has shape {list(levels.shape)}; it must be [{rows}], one noise level a row")
    return levels


def make_options(values: dict[str, Any]) -> Options:
    """The sampler's options of these names; raises UserError for a name that is none."""
    known = [field.name for field in fields(Options)]
    for name in values:
        if name not in known:
            raise UserError(f"{name} is no option of the sampler; {did_you_mean(name, known)}")
    stop = values.get("stop", ())
    return Options(**values | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)})


def are_texts(value: Any) -> TypeGuard[Sequence[str]]:
    """Whether this is a list (or tuple) of strings; an empty one is none."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(part, str) for part in value)


def number_and_prompt(start: Any, num: int | None, prompt: Prompt) -> tuple[int, Prompt]:
    """How many texts, and their prompt, where the first word of a call may be either."""
    if isinstance(start, int):
        if num is not None:
            raise UserError(f"num is given twice, as {start} and as num={num}; give it once")
        num = start
    elif start is not None:
        if prompt is not None:
            raise UserError("the prompt is given twice, as the first word and as prompt=…; give it once")
        prompt = start
    if num is None:
        num = len(prompt) if prompt is not None and are_texts(prompt) else TEXTS
    if not isinstance(num, int) or isinstance(num, bool):
        raise UserError(f"num={num!r} must be a whole number of texts")
    return num, prompt


def check_rows(num: int, batch: int, seed: int) -> None:
    """Raise UserError for numbers of texts that cannot be drawn, or a seed that no generator takes."""
    for name, value in (("num", num), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
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
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"device={device} cannot be used ({reason}); 'cpu' always can") from None
    return opened
