"""A synthetic source of known entropy: a seeded stationary first-order Markov chain.

No model can code its text in fewer nats than the entropy rate on average, so a bound below it is a wrong bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.rng import Purpose, generator

CONCENTRATION = 0.1  # of the Dirichlet rows: most of a row's mass lies on two or three symbols
UNIFORM_SHARE = 0.02  # keeps every transition possible, so that there is one stationary distribution
MATRIX, TEXT = 0, 1  # what a generator's place is for


class MarkovSource:
    """Symbols 0 … S-1, each drawn given the one before.

    transition [S, S]: row i holds p(next | i). stationary [S]: the distribution of every position. entropy_rate: nats
    per symbol given all before it. All are fp64 and depend on (symbols, seed) only.
    """

    def __init__(self, symbols: int, seed: int):
        self.symbols, self.seed = symbols, seed
        rng = generator(seed, Purpose.SYNTHETIC, MATRIX)
        rows = rng.dirichlet(np.full(symbols, CONCENTRATION), size=symbols)
        self.transition = (1 - UNIFORM_SHARE) * rows + UNIFORM_SHARE / symbols
        self.transition /= self.transition.sum(1, keepdims=True)
        self.stationary = _stationary(self.transition)
        self.entropy_rate = float(-(self.stationary[:, None] * self.transition * np.log(self.transition)).sum())

    @classmethod
    def of(cls, settings: dict[str, Any]) -> MarkovSource:
        """The source of a pack from its manifest's `settings`; raises UserError if it is of another or changed."""
        try:
            source = cls(int(settings["symbols"]), int(settings["seed"]))
            recorded = float(settings["entropy_rate"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "the pack is not of a Markov source; make one with `python -m data_prep.synthetic`"
            ) from None
        if abs(source.entropy_rate - recorded) > 1e-8:
            raise UserError(
                f"the pack's Markov source had an entropy rate of {recorded} nats, here its seed gives "
                f"{source.entropy_rate}: it was made by another version; make it again"
            )
        return source

    def settings(self) -> dict[str, Any]:
        """What `of` needs, as plain values."""
        return {"symbols": self.symbols, "seed": self.seed, "entropy_rate": round(self.entropy_rate, 9)}

    def sample(self, rows: int, length: int, part: int = 0, piece: int = 0) -> np.ndarray:
        """Independent stretches of the chain, int64 [rows, length]; another (part, piece) is other text."""
        u = generator(self.seed, Purpose.SYNTHETIC, TEXT, part, piece).random((rows, length))
        ids = np.empty((rows, length), np.int64)
        ids[:, 0] = _draw(self.stationary, u[:, 0])
        for i in range(1, length):
            ids[:, i] = _draw(self.transition[ids[:, i - 1]], u[:, i])
        return ids

    def nll(self, rows: np.ndarray) -> np.ndarray:
        """-log p(x_1 … x_{L-1} | x_0) in nats [N] of ids [N, L]; (L - 1) * entropy_rate on average."""
        return -np.log(self.transition)[rows[:, :-1], rows[:, 1:]].sum(1)


def _stationary(transition: np.ndarray) -> np.ndarray:
    """The distribution [S] with pi P = pi."""
    size = len(transition)
    # One equation of pi (P - 1) = 0 follows from the others and makes room for sum(pi) = 1.
    system = (transition - np.eye(size)).T
    system[-1] = 1.0
    pi: np.ndarray = np.linalg.solve(system, np.eye(size)[-1])
    return pi


def _draw(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Symbols [N] by inverting the distribution function of p [S] or [N, S] at u [N] in [0, 1)."""
    cdf = p.cumsum(-1)
    # The last step of the sum is 1 but for rounding, which must not make a symbol S.
    symbols: np.ndarray = (cdf[..., :-1] <= u[:, None]).sum(-1)
    return symbols
