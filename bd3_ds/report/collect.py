"""What runs have left on disk, read back: training steps, evaluations, and a few facts of the configuration."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bd3_ds.runtime import records
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.log import TRAIN_RECORDS

EVALUATIONS = "records/eval.jsonl"
_TRAIN_KEYS = ("step", "samples", "tokens", "loss", "nelbo", "grad_norm", "lr", "seconds")
_EVALUATION_KEYS = ("export", "step", "set", "estimator", "nelbo", "stderr", "ppl", "tokens", "pack_hash")


@dataclass(frozen=True)
class RunRecords:
    """A run's records, by step; `objective` and `block_size` as its configuration has them, None where unknown."""

    name: str
    path: Path
    objective: str | None
    block_size: int | None
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def sets(self) -> list[str]:
        """Names of the sets that were evaluated, in order of appearance."""
        return list(dict.fromkeys(line["set"] for line in self.evaluations))

    def history(self, set_name: str) -> list[dict[str, Any]]:
        """Evaluations on one set, by step."""
        return [line for line in self.evaluations if line["set"] == set_name]

    def newest(self) -> list[dict[str, Any]]:
        """The latest evaluation on each set."""
        return [self.history(name)[-1] for name in self.sets]

    def tokens_per_second(self) -> float:
        """Median over steps, so that the first ones and pauses do not count; nan without records."""
        rates = [
            (now["tokens"] - before["tokens"]) / now["seconds"]
            for before, now in zip(self.train, self.train[1:], strict=False)
            if now["seconds"] > 0
        ]
        return statistics.median(rates) if rates else math.nan

    def final_nelbo(self, part: float = 0.1) -> float:
        """Mean of train.nelbo over the last tenth of the steps, nats per token; nan without records.

        Steps whose noise gives no estimate of the bound (a clip, masking by frequency) do not count.
        """
        last = self.train[-max(1, int(len(self.train) * part)) :]
        bounds = [line["nelbo"] for line in last if line.get("nelbo_is_bound", True)]
        return statistics.fmean(bounds) if bounds else math.nan


def collect(places: list[str]) -> list[RunRecords]:
    """The records of each run directory; raises UserError for one that is none or has no records yet."""
    paths = [Path(place) for place in dict.fromkeys(places)]
    names = [path.resolve().name for path in paths]
    unique = len(set(names)) == len(names)
    problems = [problem for path in paths if (problem := _problem(path))]
    if problems:
        raise UserError(*problems)
    return [_read(path, name if unique else path.as_posix()) for path, name in zip(paths, names, strict=True)]


def _problem(path: Path) -> str | None:
    if not path.is_dir():
        return f"run {path} not found; give the run_dir of a training run"
    if not _train(path) and not _evaluations(path):
        return f"{path} holds no records (no lines in {TRAIN_RECORDS} or {EVALUATIONS}); train or evaluate it first"
    return None


def _read(path: Path, name: str) -> RunRecords:
    objective = _objective(path / "run.yaml")
    return RunRecords(name, path, objective.get("name"), objective.get("block_size"), _train(path), _evaluations(path))


def _train(path: Path) -> list[dict[str, Any]]:
    return _lines(path / TRAIN_RECORDS, _TRAIN_KEYS)


def _evaluations(path: Path) -> list[dict[str, Any]]:
    return _lines(path / EVALUATIONS, _EVALUATION_KEYS)


def _lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Lines that have all `keys`, by step; other programs may write lines of their own there."""
    whole = [line for line in records.read(path) if all(key in line for key in keys)]
    return sorted(whole, key=lambda line: int(line["step"]))


def _objective(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    objective = content.get("objective") if isinstance(content, dict) else None
    return objective if isinstance(objective, dict) else {}
