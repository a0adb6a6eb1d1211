"""What runs have left on disk, read back: training steps, evaluations, and a few facts of the configuration."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from bd3_ds.runtime import records
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.run_dir import EVALUATIONS, RECORDS, RUN_YAML, TRAIN_RECORDS

REPORT = "report.md"
AXES = {"steps": "optimizer step", "tokens": "tokens trained on", "seconds": "seconds of training steps"}
_TRAIN_KEYS = ("step", "samples", "tokens", "loss", "nelbo", "grad_norm", "lr", "seconds")
_EVALUATION_KEYS = ("export", "step", "set", "estimator", "nelbo", "stderr", "ppl", "tokens", "pack_hash")


@dataclass(frozen=True)
class RunRecords:
    """A run's records, by step.

    `objective` and `block_size` as its configuration has them, None where unknown. config: dotted key -> value of all
    its run.yaml, empty where that cannot be read.
    """

    name: str
    path: Path
    objective: str | None
    block_size: int | None
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)

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

    def final_steps(self, part: float = 0.1) -> list[dict[str, Any]]:
        """The last tenth of the training steps, at least one where there is one."""
        return self.train[-max(1, int(len(self.train) * part)) :]

    def final_nelbo(self) -> float:
        """Mean of train.nelbo over the last tenth of the steps, nats per token; nan where none of them has one.

        Steps whose noise gives no estimate of the bound (a clip, masking by frequency), and those that were not finite,
        do not count.
        """
        bounds = [line["nelbo"] for line in self.final_steps() if is_bound(line) and line["nelbo"] is not None]
        return statistics.fmean(bounds) if bounds else math.nan

    @property
    def has_bound(self) -> bool:
        """Whether any training step estimated the bound."""
        return any(is_bound(line) for line in self.train)

    def at(self, steps: list[int], axis: str) -> list[float]:
        """Where optimizer steps stand on an axis of AXES: `seconds` are those of all steps up to there.

        Steps between two records stand at the earlier one; nan before the first one.
        """
        if axis == "steps":
            return [float(step) for step in steps]
        known = [int(line["step"]) for line in self.train]
        if axis == "tokens":
            values = [float(line["tokens"]) for line in self.train]
        else:
            values = list(accumulate(float(line["seconds"]) for line in self.train))
        found = [bisect_right(known, step) - 1 for step in steps]
        return [values[place] if place >= 0 else math.nan for place in found]


def is_bound(line: dict[str, Any]) -> bool:
    """Whether a training step's `nelbo` estimates the bound; records that do not say so do."""
    return bool(line.get("nelbo_is_bound", True))


def differences(runs: list[RunRecords]) -> list[dict[str, Any]]:
    """For each run, the keys of its configuration whose values are not the same in all of `runs`; never run_dir.

    A run whose configuration cannot be read takes no part.
    """
    read = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in read for key in config)
    differing = [
        key for key in keys if key != "run_dir" and any(config.get(key) != read[0].get(key) for config in read)
    ]
    return [{key: run.config[key] for key in differing if key in run.config} for run in runs]


def collect(places: list[str], out: Path | None = None) -> list[RunRecords]:
    """The records of each run directory; raises UserError for one that is none or has no records yet.

    What this program wrote before, at `out` or elsewhere, is no run and is left out: a pattern such as runs/* names it
    too.
    """
    paths = [Path(place) for place in dict.fromkeys(places)]
    paths = [path for path in paths if not _is_report(path) and (out is None or path.resolve() != out.resolve())]
    if not paths:
        raise UserError(f"{', '.join(places)} holds reports alone; give the run_dir of a training run")
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


def _is_report(path: Path) -> bool:
    """Whether a directory holds what `run.py report` writes, and no records."""
    return (path / REPORT).is_file() and not (path / RECORDS).exists()


def _read(path: Path, name: str) -> RunRecords:
    config = dict(_leaves(_configuration(path / RUN_YAML)))
    size = config.get("objective.block_size")
    return RunRecords(name, path, config.get("objective.name"), size, _train(path), _evaluations(path), config)


def _train(path: Path) -> list[dict[str, Any]]:
    return _lines(path / TRAIN_RECORDS, _TRAIN_KEYS)


def _evaluations(path: Path) -> list[dict[str, Any]]:
    return _lines(path / EVALUATIONS, _EVALUATION_KEYS)


def _lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Lines that have all `keys`, by step; other programs may write lines of their own there."""
    whole = [line for line in records.read(path) if all(key in line for key in keys)]
    return sorted(whole, key=lambda line: int(line["step"]))


def _configuration(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _leaves(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value; an empty mapping is a value."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
