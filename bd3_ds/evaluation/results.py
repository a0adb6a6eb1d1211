"""What workers have found out about a run: one line per result, never two for the same thing."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bd3_ds.runtime import records

EVALUATIONS = "records/eval.jsonl"  # one line per (export, set)
SAMPLES = "records/samples.jsonl"  # one line per export
ERRORS = "records/eval-errors.jsonl"  # one line per set and sentence
LEASES = "leases"  # directory of claims and locks in a run directory
TEXTS = ""  # stands beside the names of sets for an export's samples
_KEYS = {EVALUATIONS: ("export", "set"), SAMPLES: ("export",), ERRORS: ("set", "error")}


class Results:
    """The result files in a run directory, shared with other workers and with readers."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir

    def done(self) -> set[tuple[str, str]]:
        """(export, set) of every evaluation on record, and (export, TEXTS) of every export with samples."""
        evaluated = {(line["export"], line["set"]) for line in self._read(EVALUATIONS)}
        return evaluated | {(line["export"], TEXTS) for line in self._read(SAMPLES)}

    def add(self, file: str, record: dict[str, Any]) -> bool:
        """Append `record` to one of the files above unless it has a line of the same key; says whether it did."""
        keys = _KEYS[file]
        with self._alone():
            if any(all(line[key] == record[key] for key in keys) for line in self._read(file)):
                return False
            records.append(self._run_dir / file, record)
        return True

    def _read(self, file: str) -> list[dict[str, Any]]:
        return [line for line in records.read(self._run_dir / file) if all(key in line for key in _KEYS[file])]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other workers out; the kernel ends the lock with the process, however that ends."""
        path = self._run_dir / LEASES / "records.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: the leases alone keep workers apart
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
