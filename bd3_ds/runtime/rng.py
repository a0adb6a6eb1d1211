"""Counter-based random numbers: a function of their position in the run, never of what was drawn before.

A Philox generator (Salmon et al. 2011) is keyed by the run's seed and the purpose, and its counter by the position
(step, sample, ...). The same position gives the same numbers on any rank, at any world size, after any restart.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Separate streams, so that one use of randomness cannot correlate with another."""

    RATE_STRATA = 1
    RATE_JITTER = 2
    MASK = 3
    DROPOUT = 4
    INIT = 5
    EVALUATION = 6
    SAMPLING = 7
    SYNTHETIC = 8
    BLOCK_SIZE = 9
    CLIP_SEARCH = 10
    VARIANCE = 11


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """A generator for one place; at most three non-negative integers name it."""
    if len(place) > 3:
        raise ValueError(f"a place is at most three integers, got {place}")
    words = [0, *place, *([0] * (3 - len(place)))]
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=words))


def integer_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """A 63-bit seed for libraries that take one number (torch)."""
    return int(generator(seed, purpose, *place).integers(0, 2**63 - 1))
