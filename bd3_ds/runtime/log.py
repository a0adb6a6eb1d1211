"""The log of a run, written by the main rank only: console lines, TensorBoard scalars, one JSON line a step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bd3_ds.runtime import records
from bd3_ds.runtime.run_dir import INCIDENTS, TENSORBOARD, TRAIN_RECORDS, VALIDATION


class RunLog:
    """Writes into a run directory; on other ranks every call does nothing."""

    def __init__(self, run_dir: Path, enabled: bool, first_step: int):
        self._path = run_dir / TRAIN_RECORDS
        self._incidents = run_dir / INCIDENTS
        self._validation = run_dir / VALIDATION
        self._pending: list[dict[str, Any]] = []
        self._writer: Any = None
        self._enabled = enabled
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            # What the last run wrote after its last checkpoint is about to be written again. TensorBoard's points stay:
            # they come again, and purge_step would hide the later steps of the evaluation worker in this directory too.
            records.truncate_after(self._path, first_step)
            records.truncate_after(self._incidents, first_step)
            records.truncate_after(self._validation, first_step)
            self._writer = SummaryWriter(str(run_dir / TENSORBOARD))

    def say(self, text: str) -> None:
        """A line on the console."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr)  # above a progress bar, if there is one
            sys.stderr.flush()

    def record(self, line: dict[str, Any]) -> None:
        """Keep one line of records/train.jsonl until `flush`."""
        if self._enabled:
            self._pending.append(line)

    def incident(self, line: dict[str, Any]) -> None:
        """One line of records/incidents.jsonl, at once."""
        if self._enabled:
            records.append(self._incidents, line)

    def validation(self, line: dict[str, Any]) -> None:
        """One line of records/validation.jsonl, at once."""
        if self._enabled:
            records.append(self._validation, line)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points in TensorBoard."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Put all that is kept on disk."""
        if self._enabled:
            records.append(self._path, *self._pending)
            self._pending.clear()
            self._writer.flush()

    def close(self) -> None:
        """Flush and end."""
        if self._enabled:
            self.flush()
            self._writer.close()
