"""Retention: prunes old checkpoints and exports. A removal that fails ends nothing: it is tried again later.

Network file systems refuse to remove what another machine has open (EBUSY, ENOTEMPTY). What is half removed is in no
list: a checkpoint loses its manifest first, an export its name.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from bd3_ds.checkpoint.manifest import MANIFEST, checkpoint_directories, complete_checkpoints, is_ours
from bd3_ds.config.schema import EvalConfig
from bd3_ds.runtime import records
from bd3_ds.runtime.files import sync
from bd3_ds.runtime.run_dir import ERRORS, EVALUATIONS, EXPORTS, LEASES, SAMPLES
from bd3_ds.runtime.step_names import step_of

_OF_EXPORTS = {"model.safetensors", "config.yaml", "export.json", "tokenizer"}
_REMOVED = ".removed"  # ends the hidden name of an export on its way out
_SILENT = 3600.0  # seconds without a heartbeat after which a claim holds nothing; workers beat twice a minute


def prune_checkpoints(directory: Path, tag: str, keep: int, keep_every: int | None) -> dict[Path, OSError]:
    """Of the complete checkpoints up to `tag` keep the newest, and those of every `keep_every` steps; no others.

    Later ones belong to a past that this run did not continue, because they were torn or damaged; counting them as the
    newest would throw away the good ones. Directories with other names or with a user's files in them stay. Returns
    what could not be removed.
    """
    last = step_of(tag)
    assert last is not None
    past = [found for found in complete_checkpoints(directory) if (step_of(found.path.name) or 0) <= last]
    kept = [found.path for found in past[-keep:]]
    if keep_every is not None:
        kept += [found.path for found in past if found.state["step"] % keep_every == 0]
    failed = {}
    for path in checkpoint_directories(directory):
        if path not in kept and path.name != tag and is_ours(path):
            try:
                remove_checkpoint(path)
            except OSError as error:
                failed[path] = error
    return failed


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its manifest first; of the rest as much as goes. Raises the first OSError.

    Where the manifest stays, all else does: the checkpoint is then as complete as it was.
    """
    (path / MANIFEST).unlink(missing_ok=True)
    sync(path)  # a power cut must not bring the manifest back without its files
    remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a directory; where a file of it cannot be removed the others are. Raises the first OSError."""
    failed: OSError | None = None
    for entry in path.iterdir():
        try:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    path.rmdir()


def prune_exports(run_dir: Path, step: int, keep: int, wanted: EvalConfig) -> dict[Path, OSError]:
    """Of the exports up to `step` keep the newest, and those that an evaluation worker reads or still has to evaluate.

    Where no worker ever claimed anything, none is waited for. Later exports, other names, links and directories with a
    user's files stay. Returns what could not be removed.
    """
    places = list((run_dir / EXPORTS).iterdir())
    half = [path for path in places if path.name.startswith(".step-") and path.name.endswith(_REMOVED)]
    past = sorted((at, path) for path in places if (at := step_of(path.name)) is not None and at <= step)
    failed = {}
    for path in [*half, *(path for _, path in past[: -max(keep, 1)])]:
        try:
            if path in half:
                remove_tree(path)
            elif _is_export_of_ours(path) and not _needed(run_dir, path.name, wanted):
                aside = path.with_name(f".{path.name}{_REMOVED}")
                os.rename(path, aside)
                remove_tree(aside)
        except OSError as error:
            failed[path] = error
    return failed


def _is_export_of_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    return {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} <= _OF_EXPORTS


def _needed(run_dir: Path, name: str, wanted: EvalConfig) -> bool:
    """Whether a worker holds a claim on the export, or follows the run and has not put all of it on record yet."""
    leases = run_dir / LEASES
    claims = [path for path in leases.glob("step-*.*") if path.suffix[1:].isdigit()]
    if not claims:
        return False
    own = [path for path in leases.glob(f"{glob.escape(name)}.*") if path in claims]
    if own and _is_held(max(own, key=lambda path: int(path.suffix[1:]))):
        return True
    done = {line.get("set") for line in records.read(run_dir / EVALUATIONS) if line.get("export") == name}
    if any(line.get("export") == name for line in records.read(run_dir / SAMPLES)):
        done.add("")
    done |= {line.get("set") for line in records.read(run_dir / ERRORS)}  # a set that fails is not tried again
    return not {*wanted.sets, *([""] if wanted.samples else [])} <= done


def _is_held(claim: Path) -> bool:
    with suppress(ValueError):
        if json.loads(claim.read_text(encoding="utf-8")).get("released"):
            return False
    return time.time() - claim.stat().st_mtime < _SILENT
