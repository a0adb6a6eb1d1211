"""Earlier configurations of a run: its newest checkpoint's, and that of RUN_DIR/run.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bd3_ds.checkpoint.manifest import committed
from bd3_ds.config.keys import flat
from bd3_ds.config.load import from_values, load_resolved
from bd3_ds.config.schema import RunConfig
from bd3_ds.runtime.run_dir import CHECKPOINTS, RUN_YAML

CONFIGURATION = "configuration"  # in the state of a checkpoint: the RunConfig that it was saved under, as plain values
# What a run may not change between its start and its continuation.
_FIXED = ("model.", "data.", "objective.", "seed", "optim.name", "train.global_batch", "train.precision")
_FREE = ("data.workers", "data.train", "data.cache", "data.predownload", "model.attention")
_UNSAID = ("run_dir",)


def earlier_runs(run_dir: Path) -> list[RunConfig]:
    """The newest committed checkpoint's configuration, then run.yaml's; what is not there is left out.

    A checkpoint of an earlier version holds none. Raises UserError for one that is not ours.
    """
    found = []
    checkpoint = committed(run_dir / CHECKPOINTS)
    if checkpoint is not None and CONFIGURATION in checkpoint.state:
        found.append(from_values(checkpoint.state[CONFIGURATION], str(checkpoint.path)))
    path = run_dir / RUN_YAML
    if path.is_file():
        found.append(load_resolved(path))
    return found


def refused_changes(earlier: list[RunConfig], run: RunConfig) -> list[str]:
    """Changes between starts of a run that are not allowed, a sentence each."""
    problems: dict[str, str] = {}
    for before in earlier:
        for key, (old, new) in _changes(before, run).items():
            if key.startswith(_FIXED) and not key.startswith(_FREE):
                sentence = (
                    f"{key} was {old} when {run.run_dir} was started and is {new} now; "
                    "set it back, or give the new run a run_dir of its own"
                )
                problems.setdefault(key, sentence)
    return list(problems.values())


def changes_in_words(earlier: list[RunConfig], run: RunConfig) -> str | None:
    """One line about what has changed since the newest checkpoint was saved; None where nothing has."""
    changes = _changes(earlier[0], run) if earlier else {}
    listed = [f"{key} {old} -> {new}" for key, (old, new) in changes.items() if key not in _UNSAID]
    return f"going on with {', '.join(listed)}" if listed else None


def _changes(earlier: RunConfig, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Key -> value before and now."""
    before, now = flat(earlier), flat(run)
    if list(before["data.mix"].values()) == list(now["data.mix"].values()):
        before["data.mix"] = now["data.mix"]  # packs may move; that they are the same is seen by their hashes
    return {key: (before[key], now[key]) for key in now if before[key] != now[key]}
