"""Result records of a run, by workers and `evaluate --record`: one line per result, never two of the same key.

A worker's result does not replace one that is on record. What a user asks for by `evaluate --record` does: the newest
evaluation of an (export, set) stands in records/eval.jsonl, and the line that it took the place of is kept in
records/eval-replaced.jsonl.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bd3_ds.runtime import records
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import write_text
from bd3_ds.runtime.run_dir import ERRORS, EVALUATIONS, LEASES, REPLACED, SAMPLES

TEXTS = ""  # stands beside the names of sets for an export's samples
_KEYS = {EVALUATIONS: ("export", "set"), SAMPLES: ("export",), ERRORS: ("set", "error")}


class EvaluationRecords:
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
        with self._locked():
            if any(all(line[key] == record[key] for key in keys) for line in self._read(file)):
                return False
            records.append(self._run_dir / file, record)
        return True

    def replace(self, record: dict[str, Any]) -> bool:
        """Put an evaluation on record in place of those of its (export, set), which are kept aside; says if any were.

        Raises UserError on a file system without locks: there a worker's line could be lost.
        """
        keys = _KEYS[EVALUATIONS]
        with self._locked() as locked:
            if not locked:
                raise UserError(
                    f"--record: the file system of {self._run_dir} has no file locks, so a worker's line could be "
                    "lost; use --json FILE"
                )
            lines = records.read(self._run_dir / EVALUATIONS)
            old = [line for line in lines if all(line.get(key) == record[key] for key in keys)]
            if not old:
                records.append(self._run_dir / EVALUATIONS, record)
                return False
            records.append(self._run_dir / REPLACED, *old)
            kept = [line for line in lines if line not in old]
            text = "".join(json.dumps(line) + "\n" for line in [*kept, record])
            write_text(self._run_dir / EVALUATIONS, text)
        return True

    def _read(self, file: str) -> list[dict[str, Any]]:
        return [line for line in records.read(self._run_dir / file) if all(key in line for key in _KEYS[file])]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Keep others out, False where that cannot be; the kernel ends the lock with the process, however that ends."""
        path = self._run_dir / LEASES / "records.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                locked = True
            except OSError:  # a file system without locks: only the leases keep workers apart
                locked = False
            yield locked
