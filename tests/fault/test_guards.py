"""Steps that go wrong: they are skipped, told, and counted; a run that stalls or has no room left ends by itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bd3_ds.checkpoint.store import complete_checkpoints
from bd3_ds.runtime import records
from bd3_ds.runtime.errors import EXIT_STOPPED
from bd3_ds.runtime.extensions import drop_stale_locks, extensions_folder
from bd3_ds.runtime.run_dir import INCIDENTS
from bd3_ds.train.guards import MIN_LOSSES, is_spike
from bd3_ds.train.state import RECENT, SKIPPED_OF, TrainState
from tests.helpers.launch import (
    PATIENCE,
    ROOT,
    curve,
    environment,
    free_port,
    launch_training,
    rank_process,
    start_training,
    stop,
    train,
    train_records,
    wait_for_end,
    wait_for_step,
)
from tests.helpers.tiny import tiny_run

WORDS = ("train.global_batch=8", "train.export_every=1000", "train.checkpoint_every=4")


def test_a_spike_lies_above_what_came_before():
    losses = [5.0 + 0.1 * (i % 2) for i in range(MIN_LOSSES)]  # mean 5.05, standard deviation 0.05
    assert is_spike(losses, 5.46, 8) and not is_spike(losses, 5.44, 8)
    assert not is_spike(losses, 1.0, 8) and not is_spike(losses[1:], 100.0, 8)


def test_the_state_remembers_losses_of_updates_and_steps_without_one():
    state = TrainState()
    for step in range(SKIPPED_OF + 300):
        state = state.advance(1, 1).with_loss(None if step % 100 == 0 else float(step))
    assert state.recent[-1] == SKIPPED_OF + 299 and len(state.recent) == RECENT
    assert 0.0 not in state.recent and state.skipped == tuple(range(301, SKIPPED_OF + 300, 100))
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_watchdog_ends_a_process_that_stalls_and_shows_where():
    script = textwrap.dedent(
        """
        import time
        from bd3_ds.train.guards import Watchdog
        def stuck_here(): time.sleep(60)
        with Watchdog(1, rank=3) as watchdog:
            for _ in range(4):
                watchdog.beat("at step 7")
                time.sleep(0.5)
            stuck_here()
        """
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "error: rank 3 has been at step 7 for guards.stall_seconds=1" in done.stderr
    assert "in stuck_here" in done.stderr


def test_a_watchdog_that_is_off_or_left_ends_nothing():
    script = (
        "import time; from bd3_ds.train.guards import Watchdog\n"
        "with Watchdog(0, 0): time.sleep(1.2)\n"
        "with Watchdog(1, 0): pass\n"
        "time.sleep(1.5)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=50).returncode == 0


def test_only_locks_that_nobody_holds_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / f"py311_cpu/op{i}/lock" for i in range(2)]
    for lock in locks:
        lock.parent.mkdir(parents=True)
    left = os.open(locks[0], os.O_CREAT | os.O_EXCL)
    held = os.open(locks[1], os.O_CREAT | os.O_EXCL)
    os.close(left)  # as the end of a killed process does
    for lock in locks:
        os.utime(lock, (0, 0))  # where the disk may be shared with other hosts, age counts too
    assert drop_stale_locks() == [locks[0]]
    assert not locks[0].exists() and locks[1].exists()
    os.close(held)
    assert drop_stale_locks() == [locks[1]] and drop_stale_locks() == []


def test_whatever_joins_other_ranks_drops_stale_locks_first():
    """Not only training: a benchmark or a probe would wait for a killed compiler for ever."""
    lock = extensions_folder() / f"killed_in_test_{os.getpid()}/lock"
    lock.parent.mkdir(parents=True)
    try:
        lock.touch()
        os.utime(lock, (0, 0))
        script = "from bd3_ds.runtime.world import join_world; join_world()"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        assert f"removed {lock}, which a killed process left behind" in done.stderr and not lock.exists()
    finally:
        shutil.rmtree(lock.parent)


def faulty(monkeypatch: pytest.MonkeyPatch, **faults: object) -> str:
    monkeypatch.setenv("BD3_FAULTS", json.dumps({key.removeprefix("at"): value for key, value in faults.items()}))
    return "tests/helpers/faulty.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ds_config", "precision"), [("zero0", "bf16"), ("zero2", "bf16"), ("zero2", "fp32"), ("zero3", "bf16")]
)
def test_steps_that_are_not_finite_make_no_update_on_any_rank(tmp_path, monkeypatch, ds_config, precision):
    """What was skipped is on record with its samples, also over a stop."""
    run = tiny_run(tmp_path)
    script = faulty(monkeypatch, at3="nan", at6="inf")
    words = (*WORDS, f"run_dir={run.run_dir}", f"train.precision={precision}")
    for steps in (5, 8):
        train(tmp_path / "recipe.yaml", *words, f"train.total_steps={steps}", ds_config=ds_config, script=script)
    lines = train_records(Path(run.run_dir))
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 6]
    incidents = records.read(Path(run.run_dir) / INCIDENTS)
    assert [(line["step"], line["reason"], line["skipped"]) for line in incidents] == [
        (3, "not finite", True),
        (6, "not finite", True),
    ]
    assert all(len(set(line["samples"])) == 8 and set(line["samples"]) < set(range(64)) for line in incidents)
    last = complete_checkpoints(Path(run.run_dir) / "checkpoints")[-1].state
    assert (last["step"], last["updates"], last["ema_updates"], last["skipped"]) == (8, 6, 6, [3, 6])


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    script = faulty(monkeypatch, at2="nan", at4="nan", at5="nan")
    words = (*WORDS, f"run_dir={run.run_dir}", "train.total_steps=20", "guards.max_skipped=2")
    done = launch_training(tmp_path / "recipe.yaml", *words, script=script)
    assert done.returncode == 2, done.stdout
    assert "3 steps of the last 1000 made no update, more than guards.max_skipped=2" in done.stdout
    assert "Traceback" not in done.stdout and len(records.read(Path(run.run_dir) / INCIDENTS)) == 3
    (kept,) = complete_checkpoints(Path(run.run_dir) / "checkpoints")  # begun after step 4, when step 5 ended the run
    assert kept.state["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["warn", "skip", "stop"])
def test_spikes_are_told_skipped_or_stop_the_run(tmp_path, monkeypatch, policy):
    run = tiny_run(tmp_path)
    at = MIN_LOSSES + 3
    script = faulty(monkeypatch, **{f"at{at}": 50.0})
    words = (*WORDS, f"run_dir={run.run_dir}", f"train.total_steps={at + 3}", f"guards.spike={policy}")
    done = launch_training(tmp_path / "recipe.yaml", *words, ds_config="zero1", script=script)
    assert done.returncode == (2 if policy == "stop" else 0), done.stdout
    (incident,) = records.read(Path(run.run_dir) / INCIDENTS)
    assert (incident["step"], incident["reason"], incident["skipped"]) == (at, "spike", policy == "skip")
    assert ("is a spike, and guards.spike=stop" in done.stdout) == (policy == "stop")


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_job_which_then_continues(tmp_path):
    tiny_run(tmp_path)
    recipe, words = tmp_path / "recipe.yaml", (*WORDS, "train.total_steps=200", "guards.stall_seconds=10")
    calm, stalled = tmp_path / "calm", tmp_path / "stalled"
    train(recipe, *words, f"run_dir={calm}")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with start_training(recipe, *words, f"run_dir={stalled}", **options) as process:
        wait_for_step(stalled, 20, process)
        rank_process(process, 1).send_signal(signal.SIGSTOP)
        assert wait_for_end(process, 120) != 0
        said = process.stdout.read()
    # Where rank 0 waits depends on what rank 1 still sent: in a step, or where both agree that a checkpoint is whole.
    assert re.search(r"error: rank 0 has been (at step \d+|saving) for guards.stall_seconds=10;", said), said
    assert "in train\n" in said, said
    train(recipe, *words, f"run_dir={stalled}")
    assert curve(stalled) == curve(calm)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_leaves_with_a_code_of_its_own(tmp_path):
    run = tiny_run(tmp_path)
    words = (*WORDS, f"run_dir={run.run_dir}", "train.total_steps=100000")
    with start_training(tmp_path / "recipe.yaml", *words, ranks=1) as process:
        wait_for_step(Path(run.run_dir), 10, process)
        stop(process, signal.SIGTERM)
        assert process.returncode == EXIT_STOPPED
    (*_, last) = complete_checkpoints(Path(run.run_dir) / "checkpoints")
    assert last.state["step"] == len(train_records(Path(run.run_dir)))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_the_same_command_continues(tmp_path):
    """The run directory is a file system of a few MiB, for which another file leaves little room."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file systems may be mounted here")
    tiny_run(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = (
        f"{Path(sys.executable).parent / 'deepspeed'} --num_accelerators 2 --master_port $PORT run.py train "
        f"{tmp_path / 'recipe.yaml'} run_dir={disk}/run {' '.join(WORDS)} train.total_steps=16 train.precision=fp32"
    )
    look = (
        "from pathlib import Path; from bd3_ds.checkpoint.store import complete_checkpoints; "
        f"print('complete', [c.state['step'] for c in complete_checkpoints(Path('{disk}/run/checkpoints'))])"
    )
    script = (
        f"mount -t tmpfs -o size=4m none {disk} && head -c 2500000 /dev/zero > {disk}/ballast; "
        f'{command}; echo "code $?"; {sys.executable} -c "{look}"; '
        f'rm {disk}/ballast; {command}; echo "code $?"; {sys.executable} -c "{look}"'
    )
    env = {**environment(), "PORT": str(free_port())}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
    )
    said = done.stdout + done.stderr
    full, _, after = done.stdout.partition("code 0")
    assert "code 2" in full and "No space left on device" in done.stderr and "Traceback" not in said, said
    assert "complete [4" in full and "complete [12, 16]" in after, said
