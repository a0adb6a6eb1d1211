"""train.keep_exports: old exports go, but none that is the newest, is being evaluated or waits for a worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bd3_ds.checkpoint.retention import prune_exports
from bd3_ds.evaluation.worker.leases import claim
from bd3_ds.runtime import records
from bd3_ds.runtime.run_dir import EVALUATIONS, LEASES
from tests.helpers.tiny import tiny_export, tiny_run


@pytest.fixture
def run(tmp_path):
    run = tiny_run(tmp_path)
    for step in (2, 4, 6, 8):
        tiny_export(run, step)
    return run


def left(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "exports").iterdir())


def test_the_newest_stay_and_users_directories(run):
    run_dir = Path(run.run_dir)
    (run_dir / "exports" / "step-00000002-mine").mkdir()
    (run_dir / "exports" / "step-00000002" / "notes.txt").write_text("mine")
    assert prune_exports(run_dir, 6, 1, run.eval) == {}  # 8 is of a past that the run did not continue
    assert left(run_dir) == ["step-00000002", "step-00000002-mine", "step-00000006", "step-00000008"]
    assert prune_exports(run_dir, 8, 1, run.eval) == {}
    assert left(run_dir) == ["step-00000002", "step-00000002-mine", "step-00000008"]


def test_what_a_worker_holds_or_has_not_evaluated_stays(run):
    run_dir = Path(run.run_dir)
    lease = claim(run_dir / LEASES, "step-00000002")
    assert lease is not None
    for step in (2, 4):
        records.append(run_dir / EVALUATIONS, {"export": f"step-{step:08d}", "set": "valid"})
    prune_exports(run_dir, 8, 1, run.eval)
    assert left(run_dir) == ["step-00000002", "step-00000006", "step-00000008"]  # held, to be evaluated, newest
    lease.release()
    records.append(run_dir / EVALUATIONS, {"export": "step-00000006", "set": "valid"})
    prune_exports(run_dir, 8, 1, run.eval)
    assert left(run_dir) == ["step-00000008"]


def test_a_removal_that_fails_is_told_and_done_later(run, monkeypatch):
    run_dir, unlink = Path(run.run_dir), os.unlink

    def busy(path, *args, **options):
        if os.fspath(path).endswith("model.safetensors"):
            raise OSError(16, "Device or resource busy", os.fspath(path))
        unlink(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", busy)
        failed = prune_exports(run_dir, 8, 3, run.eval)
    assert [(path.name, error.errno) for path, error in failed.items()] == [("step-00000002", 16)]
    assert left(run_dir) == [".step-00000002.removed", "step-00000004", "step-00000006", "step-00000008"]
    assert prune_exports(run_dir, 8, 3, run.eval) == {}
    assert left(run_dir) == ["step-00000004", "step-00000006", "step-00000008"]
