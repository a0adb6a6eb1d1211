"""When a text has ended, and when it has gone wrong."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 256  # tokens; the rule of Arriola et al. 2025, appendix C.5
LEAST_ENTROPY = 4.0  # nats


def truncate_at_eos(tokens: Tensor, eos_id: int, given: int = 1) -> Tensor:
    """tokens [T] up to and with the first EOS behind the `given` leading ones; all of them where there is none.

    Position 0 (BOS) is always given: many tokenizers use one id for both.
    """
    ends = (tokens[given:] == eos_id).nonzero()
    return tokens if len(ends) == 0 else tokens[: given + int(ends[0, 0]) + 1]


def unigram_entropy(tokens: Tensor) -> Tensor:
    """Entropy in nats [N] of the tokens' own frequencies in each row of tokens [N, T]."""
    # Each token votes for log(T / its count in the row); their mean is the entropy.
    counts = torch.stack([_own_counts(row) for row in tokens])  # [N, T]
    return (tokens.shape[1] / counts).log().mean(-1)


def low_entropy(tokens: Tensor) -> Tensor:
    """Rows [N] of tokens [N, T] that repeat themselves: entropy of the last 256 tokens below 4 nats (fewer: never)."""
    if tokens.shape[1] < WINDOW:
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    return unigram_entropy(tokens[:, -WINDOW:]) < LEAST_ENTROPY


def _own_counts(row: Tensor) -> Tensor:
    _, index, counts = row.unique(return_inverse=True, return_counts=True)
    return counts[index].double()
