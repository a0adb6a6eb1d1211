"""Stopping rules: end of text, and the low entropy of degenerate (repetitive) text."""

from __future__ import annotations

import torch
from torch import Tensor

from bd3_ds.sampling.options import ENTROPY, EOS

WINDOW = 256  # tokens; the rule of Arriola et al. 2025, appendix C.5
LEAST_ENTROPY = 4.0  # nats


def find_ends(tokens: Tensor, given: Tensor, stop: tuple[str, ...], eos_id: int | None) -> tuple[Tensor, Tensor]:
    """Where rows of tokens [N, T] end by the rules of `stop`, and by which: lengths [N], and why [N].

    why is 0 where a row goes on, 1 for the first EOS after its `given` [N] leading tokens (which is part of the text),
    2 for low entropy (the low-entropy window is not part of it, given tokens are). tokens may be the end of
    longer texts; given is then counted from where they begin, and may be below 0.
    """
    count, length = tokens.shape
    lengths = torch.full((count,), length, device=tokens.device)
    why = torch.zeros_like(lengths)
    if ENTROPY in stop:
        low = low_entropy(tokens)
        lengths = torch.where(low, given.clamp(min=length - WINDOW), lengths)
        why = torch.where(low, 2, why)
    if EOS in stop and eos_id is not None:
        place = torch.arange(length, device=tokens.device)
        first = place.where((tokens == eos_id) & (place >= given[:, None]), length).min(1).values  # [N]
        ends = first < lengths
        lengths = torch.where(ends, first + 1, lengths)
        why = torch.where(ends, 1, why)
    return lengths, why


def unigram_entropy(tokens: Tensor) -> Tensor:
    """Entropy in nats [N] of the tokens' own frequencies in each row of tokens [N, T]."""
    # Each token votes for log(T / its count in the row); their mean is the entropy.
    ordered = tokens.sort(dim=1).values
    counts = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)  # [N, T]
    return (tokens.shape[1] / counts.double()).log().mean(-1)


def low_entropy(tokens: Tensor) -> Tensor:
    """Rows [N] of tokens [N, T] that repeat themselves: entropy of the last 256 tokens below 4 nats (fewer: never)."""
    if tokens.shape[1] < WINDOW:
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    return unigram_entropy(tokens[:, -WINDOW:]) < LEAST_ENTROPY
