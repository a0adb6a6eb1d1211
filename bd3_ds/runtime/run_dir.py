"""The layout of a run directory; docs/map.md lists it for readers.

Paths are relative to the run directory; other programs rely on them.
"""

from __future__ import annotations

from pathlib import Path

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.files import read_json

RUN_YAML = "run.yaml"  # the resolved configuration
CHECKPOINTS = "checkpoints"  # step-*/, see checkpoint/store.py
EXPORTS = "exports"  # step-*/, see checkpoint/export.py
TENSORBOARD = "tensorboard"  # event files of the trainer and of the workers
LEASES = "leases"  # claims and locks of evaluation workers
RECORDS = "records"

# One JSON object a line; the trainer's.
TRAIN_RECORDS = "records/train.jsonl"  # one line a step
VALIDATION = "records/validation.jsonl"  # one line per validation
INCIDENTS = "records/incidents.jsonl"  # steps that were skipped, or whose loss spiked
# The evaluation workers'.
EVALUATIONS = "records/eval.jsonl"  # one line per (export, set)
REPLACED = "records/eval-replaced.jsonl"  # lines of EVALUATIONS that a newer one of the same key replaced
SAMPLES = "records/samples.jsonl"  # one line per export
ERRORS = "records/eval-errors.jsonl"  # one line per set and sentence

FINISHED = "records/finished.json"  # {"step": the step at which training ended}


def finished_step(run_dir: Path) -> int:
    """The step at which training ended, as FINISHED says; 0 where it has not, or where the file cannot be read."""
    try:
        return int(read_json(run_dir / FINISHED, "note of the run's end")["step"])
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return 0


def is_run(run_dir: Path) -> bool:
    """Whether a run was started there."""
    return (run_dir / RUN_YAML).is_file()
