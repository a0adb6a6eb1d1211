"""Evaluation workers as real processes: killed, restarted, doubled, stopped, and met with bad sets."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bd3_ds.config.load import to_yaml
from bd3_ds.evaluation.worker.worker import Worker
from bd3_ds.runtime import records
from bd3_ds.runtime.files import write_json, write_text
from tests.helpers.tiny import LENGTH, tiny_export, tiny_pack, tiny_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workers():
    """Start workers that cannot outlive the test."""
    started = []

    def start(run_dir, *words):
        log = open(run_dir.parent / f"worker-{len(started)}.log", "w+")  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "run.py", "eval-worker", str(run_dir), "--poll", "1", *words],
            cwd=ROOT,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.log.close()


def finish(process, code=0):
    """Wait for the end and return what was said on stderr."""
    returned = process.wait(120)
    process.log.seek(0)
    text = process.log.read()
    assert returned == code, text
    return text


def make_run(tmp_path, steps=(2, 4), sets=("valid",), start=True, **overrides):
    """A run as a trainer would leave it: run.yaml, exports, and a note of its end."""
    pairs = ",".join(f"{name}: {tmp_path / name}" for name in sets)
    run = tiny_run(tmp_path, f"eval.sets={{{pairs}}}", train__total_steps=max(steps), **overrides)
    for name in sets:
        if name != "valid" and not (tmp_path / name).exists():
            tiny_pack(tmp_path / name, LENGTH, 4, seed=3)
    run_dir = Path(run.run_dir)
    for step in steps:
        tiny_export(run, step)
    if start:
        begin(run)
    return run_dir, run


def begin(run):
    run_dir = Path(run.run_dir)
    write_text(run_dir / "run.yaml", to_yaml(run))
    write_json(run_dir / "records" / "finished.json", {"step": run.train.total_steps})


def evaluated(run_dir):
    return Counter((line["step"], line["set"]) for line in records.read(run_dir / "records" / "eval.jsonl"))


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def test_follows_a_run_that_starts_later(tmp_path, workers):
    run_dir, run = make_run(tmp_path, start=False, eval__samples=2)
    worker = workers(run_dir)
    wait_for(lambda: "waiting for" in (tmp_path / "worker-0.log").read_text(), worker)
    begin(run)
    finish(worker)
    lines = records.read(run_dir / "records" / "eval.jsonl")
    assert [(line["export"], line["set"]) for line in lines] == [("step-00000002", "valid"), ("step-00000004", "valid")]
    events = tensorboard(run_dir)
    for tag in ("ppl", "nelbo", "stderr"):
        points = events.Scalars(f"eval/valid/{tag}")
        assert [(point.step, pytest.approx(point.value)) for point in points] == [(x["step"], x[tag]) for x in lines]
    samples = records.read(run_dir / "records" / "samples.jsonl")
    assert [(line["step"], len(line["texts"])) for line in samples] == [(2, 2), (4, 2)]
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples")]
    assert [event.step for event in events.Tensors(tag)] == [2, 4]

    before = (run_dir / "records" / "eval.jsonl").read_bytes()
    finish(workers(run_dir, "--once"))
    assert (run_dir / "records" / "eval.jsonl").read_bytes() == before


def test_killed_in_the_middle_and_restarted(tmp_path, workers):
    sets = ("valid", "second", "third")
    run_dir, _ = make_run(tmp_path, steps=(2, 4, 6), sets=sets, eval__estimator="mc", eval__views=200)
    worker = workers(run_dir)
    wait_for(lambda: evaluated(run_dir), worker)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert 0 < len(evaluated(run_dir)) < 9
    with open(run_dir / "records" / "eval.jsonl", "a") as file:
        file.write('{"export": "step-0000')  # a line that the kill has torn
    finish(workers(run_dir))
    assert evaluated(run_dir) == {(step, name): 1 for step in (2, 4, 6) for name in sets}


def test_two_workers_share_the_exports(tmp_path, workers):
    steps = (2, 4, 6, 8)
    run_dir, _ = make_run(tmp_path, steps=steps, sets=("valid", "second"), eval__views=100)
    for worker in [workers(run_dir), workers(run_dir)]:
        finish(worker)
    assert evaluated(run_dir) == {(step, name): 1 for step in steps for name in ("valid", "second")}
    points = tensorboard(run_dir).Scalars("eval/second/ppl")
    assert sorted(point.step for point in points) == list(steps)


def test_a_bad_set_and_a_bad_export_leave_the_others_alone(tmp_path, capsys):
    sedd = {"objective__name": "sedd", "objective__block_size": None, "eval__estimator": "mc"}
    run_dir, run = make_run(tmp_path, steps=(2, 4, 6), **sedd)
    write_text(run_dir / "run.yaml", to_yaml(run).replace("  sets:\n", f"  sets:\n    gone: {tmp_path / 'gone'}\n"))
    (run_dir / "exports" / "step-00000004" / "model.safetensors").write_bytes(b"not weights")
    worker = Worker(run_dir, torch.device("cpu"), poll=1)
    worker.follow(once=False)
    worker.close()
    assert worker.exit_code == 2
    assert evaluated(run_dir) == {(2, "valid"): 1, (6, "valid"): 1}
    errors = records.read(run_dir / "records" / "eval-errors.jsonl")
    assert [(line["export"][-1], line["set"]) for line in errors] == [("2", "gone"), ("4", "gone"), ("4", "valid")]
    assert "data pack not found" in errors[0]["error"] and "damaged" in errors[1]["error"]
    said = capsys.readouterr().err
    assert said.count("data pack not found") == 1 and "Traceback" not in said


def test_asked_to_stop(tmp_path, workers):
    run_dir, _ = make_run(tmp_path, eval__estimator="mc", eval__views=3000, sets=("valid", "second"))
    worker = workers(run_dir)
    wait_for(lambda: list((run_dir / "leases").glob("step-*")), worker)
    worker.send_signal(signal.SIGTERM)
    said = finish(worker)
    assert "asked to stop" in said
    (lease,) = (run_dir / "leases").glob("step-*")
    assert '"released": true' in lease.read_text()


def test_ctrl_c_ends_with_130_and_gives_the_lease_back(tmp_path, workers):
    run_dir, _ = make_run(tmp_path, eval__estimator="mc", eval__views=3000, sets=("valid", "second"))
    worker = workers(run_dir)
    wait_for(lambda: list((run_dir / "leases").glob("step-*")), worker)
    worker.send_signal(signal.SIGINT)
    said = finish(worker, code=130)
    assert said.splitlines()[-1].startswith("eval-worker: asked to stop; ") and "Traceback" not in said
    (lease,) = (run_dir / "leases").glob("step-*")
    assert '"released": true' in lease.read_text()


def test_once_needs_a_run(tmp_path, workers):
    said = finish(workers(tmp_path / "nothing", "--once"), code=2)
    assert said.startswith("error: ") and "is not a run" in said and said.count("\n") == 1
