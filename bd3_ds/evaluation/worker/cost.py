"""The cost of evaluating an export: FLOPs beforehand, hours from its first batch on."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

from bd3_ds.config.check import estimator_used
from bd3_ds.config.registries import OBJECTIVES
from bd3_ds.config.schema import AR, EvalConfig, RunConfig, block_size
from bd3_ds.data.manifest import read_manifest
from bd3_ds.evaluation.figures import duration
from bd3_ds.model.dit_config import dit_config
from bd3_ds.model.flops import forward_flops_per_sequence, training_flops_per_sequence
from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.run_dir import TRAIN_RECORDS

TAIL = 2**16  # bytes at the end of the training records that are looked at


def set_flops(run: RunConfig, chunks: int, wanted: EvalConfig) -> float:
    """Operations that scoring so many sequences takes, with the variances where they are asked for."""
    network, size = dit_config(run.model, run.objective.name), block_size(run)
    used = estimator_used(run, wanted.estimator, "eval.estimator", chunks * (run.data.length - 1))
    views = 2**size - 1 if used == "exact" and not OBJECTIVES[run.objective.name].causal else wanted.views
    once = forward_flops_per_sequence(network, run.objective.name, run.data.length, size, views=views)
    total = chunks * (once.attention + once.mlp + once.head)
    if wanted.variance_batches > 1:
        step = training_flops_per_sequence(network, run.objective.name, run.data.length, size)
        total += wanted.variance_batches * wanted.batch * step
    return total


def sample_flops(run: RunConfig, wanted: EvalConfig) -> float:
    """Operations that drawing the texts takes, one token an evaluation of its block."""
    size, length = block_size(run), wanted.sample_length or run.data.length
    once = forward_flops_per_sequence(
        dit_config(run.model, run.objective.name), AR, run.data.length, 1, masked_share=1.0
    )
    per_token = (once.attention + once.mlp + once.head) / run.data.length
    return wanted.samples * length * size * per_token


class Pace:
    """The time that the evaluation of one export takes on this machine, measured on its batches as they end.

    sequences: name of each set -> how many of it are scored; flops: the same -> operations; other: operations beside
    them (texts). interval: seconds from one export to the next, None where unknown. hours: the most that one export may
    take. `say` gets the lines.
    """

    def __init__(
        self,
        sequences: dict[str, int],
        flops: dict[str, float],
        other: float,
        interval: float | None,
        hours: float,
        say: Callable[[str], None],
    ):
        self._sequences, self._flops, self._other = sequences, flops, other
        self._interval, self._hours, self._say = interval, hours, say
        self._last: tuple[str, int, float] | None = None
        self._told = False

    @property
    def total(self) -> float:
        """Operations of one export."""
        return sum(self._flops.values()) + self._other

    def note(self, name: str, done: int, total: int, now: float) -> None:
        """So many of a set's sequences are done at this time, in seconds of any clock.

        The first batch of a set opens it and warms the device up; the next one tells. Raises TooSlow where an export
        would take more than the hours that it may.
        """
        last, self._last = self._last, (name, done, now)
        if self._told or last is None or last[0] != name or name not in self._flops:
            return
        self._told = True
        rate = self._flops[name] * (done - last[1]) / total / max(1e-9, now - last[2])
        seconds = self.total / rate
        if seconds > 3600 * self._hours:
            raise TooSlow(
                f"an export would take about {duration(seconds)} here ({self.total:.1e} operations at {rate:.1e} a "
                f"second), above --max-hours {self._hours:g}; use --device cuda, or "
                f"{self._advice(seconds, self._interval or 3600 * self._hours)}; or raise --max-hours"
            )
        self._say(f"an export takes about {duration(seconds)}, at {rate:.1e} operations a second")
        if self._interval is not None and seconds > self._interval:
            self._say(
                f"warning: an export comes every {duration(self._interval)}, so one worker falls behind; start more "
                f"workers, on GPUs, or give {self._advice(seconds, self._interval)}"
            )

    def _advice(self, seconds: float, aim: float) -> str:
        """A number of sequences with which an export takes no more than `aim` seconds."""
        most = max(self._sequences.values())
        return f"--max-chunks {max(1, int(most * min(1.0, aim / seconds)))} (now up to {most:,} of a set)"


class TooSlow(UserError):
    """Evaluations that would not end in any useful time."""


def pace_of(run: RunConfig, wanted: EvalConfig, run_dir: Path, hours: float, say: Callable[[str], None]) -> Pace | None:
    """The pace of evaluating one export of `run` as `wanted`; None where no set can be read (each says why itself)."""
    sequences: dict[str, int] = {}
    flops: dict[str, float] = {}
    for name, directory in wanted.sets.items():
        try:
            chunks = read_manifest(directory).chunks
            chunks = min(chunks, wanted.max_chunks or chunks)
            flops[name] = set_flops(run, chunks, wanted)
        except UserError:
            continue
        sequences[name] = chunks
    if not sequences:
        return None
    pace = Pace(sequences, flops, sample_flops(run, wanted), seconds_between_exports(run, run_dir), hours, say)
    sets = ", ".join(f"{name} {count:,}" for name, count in sequences.items())
    texts = f", and {wanted.samples} texts" if wanted.samples else ""
    say(f"an export is {pace.total:.1e} operations: sequences of {run.data.length} tokens ({sets}){texts}")
    return pace


def seconds_between_exports(run: RunConfig, run_dir: Path) -> float | None:
    """The time from one export to the next at the pace of the last steps on record; None without records."""
    try:
        with open(run_dir / TRAIN_RECORDS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return None
    seconds = []
    for line in lines:
        try:
            seconds.append(float(json.loads(line)["seconds"]))
        except (ValueError, KeyError, TypeError):  # torn, at either end
            continue
    return statistics.median(seconds) * run.train.export_every if seconds else None
