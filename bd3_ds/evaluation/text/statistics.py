"""Text statistics without a judge: entropy, repetition, lengths."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any


def entropy(tokens: Sequence[Hashable]) -> float:
    """Entropy in nats of the tokens' own frequencies; 0 for an empty text, at most log(number of tokens)."""
    counts = Counter(tokens).values()
    # + 0.0: a text of one token has entropy 0, not -0.
    return -sum(count / len(tokens) * math.log(count / len(tokens)) for count in counts) + 0.0


def distinct(texts: Sequence[str], n: int) -> float | None:
    """distinct-n (Li et al. 2016): different n-grams of words per n-gram, all texts together; None where none are.

    Words are what white space parts; no n-gram spans two texts. The share falls as more text is counted.
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        grams.update(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else None


def lengths(tokens: Sequence[int]) -> dict[str, Any]:
    """Median, mean and maximum of numbers of tokens."""
    return {"median": statistics.median(tokens), "mean": statistics.fmean(tokens), "max": max(tokens)}


def mean_and_stderr(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of independent values and its standard error; None for what no, or one, value cannot tell."""
    if not values:
        return None, None
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), stderr


def ratio_and_stderr(above: Sequence[float], below: Sequence[float]) -> tuple[float, float | None]:
    """sum(above) / sum(below) over independent pairs, and its standard error to first order; None for one pair."""
    total = math.fsum(below)
    ratio = math.fsum(above) / total
    if len(above) < 2:
        return ratio, None
    squares = math.fsum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    return ratio, math.sqrt(squares * len(above) / (len(above) - 1)) / total
