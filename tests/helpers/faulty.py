"""run.py whose losses go wrong on the last rank: `BD3_FAULTS` is a JSON object of step: what the loss is multiplied by.

"nan" and "inf" are numbers too. For tests of the guards, under the real launcher.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import run
from bd3_ds.runtime.errors import leave, run_command
from bd3_ds.train import step

FAULTS = {int(at): float(factor) for at, factor in json.loads(os.environ["BD3_FAULTS"]).items()}


class FaultyStepper(step.Stepper):
    """Every step's loss as it is, but for those named."""

    def step(self, batches: Any, state: Any, *asked: bool) -> Any:
        factor = FAULTS.get(state.step + 1, 1.0) if self.world.rank == self.world.size - 1 else 1.0
        sound = step.training_loss

        def faulty(*arguments: Any) -> Any:
            loss = sound(*arguments)
            return dataclasses.replace(loss, loss=loss.loss * factor, nelbo=loss.nelbo * factor)

        step.training_loss = faulty
        try:
            return super().step(batches, state, *asked)
        finally:
            step.training_loss = sound


def main(argv: list[str]) -> int | None:
    from bd3_ds.train import build

    build.Stepper = FaultyStepper  # type: ignore[misc]
    return run.main(argv)


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
