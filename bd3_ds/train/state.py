"""Where a run stands: everything a resumed run must know beyond the engine's own tensors, counted in samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """`step` optimizer steps are done; `samples` sequences and `tokens` clean tokens went into them."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def advance(self, sequences: int, length: int) -> TrainState:
        """The state after one more step on `sequences` sequences of `length` tokens."""
        return TrainState(self.step + 1, self.samples + sequences, self.tokens + sequences * length)

    def to_dict(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        return asdict(self)
