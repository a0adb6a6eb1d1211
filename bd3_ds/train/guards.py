"""What may end a run early, decided by all ranks together: a signal that asks to stop, a loss that is not finite."""

from __future__ import annotations

import math
import signal
from types import FrameType

from bd3_ds.train.step import StepResult


class Guards:
    """Use as a context manager around the loop; SIGTERM and SIGINT then ask for a checkpoint and a clean end."""

    def __init__(self) -> None:
        self.asked = False
        self.wants_stop = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Guards:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def check(self, result: StepResult) -> None:
        """After every step: `wants_stop` becomes true on all ranks once any was asked; raises on a non-finite loss."""
        self.wants_stop = result.stop_asked
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise FloatingPointError(
                f"step {result.step}: loss {result.loss}, gradient norm {result.grad_norm} is not finite; the newest "
                "checkpoint is from before; lower optim.lr or lengthen optim.warmup_steps and start again"
            )
