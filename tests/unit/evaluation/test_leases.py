"""Leases: one holder at a time, whoever dies or races."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

from bd3_ds.evaluation.results import EvaluationRecords
from bd3_ds.evaluation.worker.leases import claim
from bd3_ds.runtime import records
from bd3_ds.runtime.run_dir import EVALUATIONS, REPLACED

RACERS, ROUNDS = 4, 30


def test_one_holder_until_released(tmp_path):
    lease = claim(tmp_path, "a")
    assert lease is not None and lease.held()
    assert claim(tmp_path, "a") is None
    other = claim(tmp_path, "b")
    assert other is not None
    lease.release()
    lease.release()
    assert not lease.held()
    with claim(tmp_path, "a") as again:
        assert again.held() and other.held()
    other.release()


def test_names_that_begin_alike_are_apart(tmp_path):
    with claim(tmp_path, "step-1"), claim(tmp_path, "step-1.5") as other:
        assert other is not None
    with claim(tmp_path, "step-1[0]"):
        assert claim(tmp_path, "step-1[0]") is None


def test_dead_holder_on_this_machine(tmp_path):
    code = "import sys, os; from pathlib import Path; from bd3_ds.evaluation.worker.leases import claim;"
    code += "claim(Path(sys.argv[1]), 'a'); os.kill(os.getpid(), 9)"
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=os.getcwd())
    assert dead.returncode == -9 and (tmp_path / "a.1").exists()
    with claim(tmp_path, "a") as lease:
        assert lease.held()


def write_holder(path, **changes):
    """A lease of a process on another machine."""
    path.write_text(json.dumps({"host": "elsewhere", "pid_space": "", "pid": 1, "started": 0.0} | changes))


def test_holder_elsewhere_lives_as_long_as_its_heart_beats(tmp_path):
    write_holder(tmp_path / "a.1")
    assert claim(tmp_path, "a", stale_after=5) is None
    old = time.time() - 60
    os.utime(tmp_path / "a.1", (old, old))
    with claim(tmp_path, "a", stale_after=5) as lease:
        assert lease.held() and lease.path.name == "a.2"


def test_heartbeat_keeps_a_lease(tmp_path):
    with claim(tmp_path, "a", stale_after=0.4) as lease:
        old = time.time() - 60
        os.utime(lease.path, (old, old))
        time.sleep(0.5)
        assert time.time() - lease.path.stat().st_mtime < 10


def test_holder_that_was_taken_for_dead_learns_of_it(tmp_path):
    with claim(tmp_path, "a") as lease:
        write_holder(tmp_path / "a.2")
        assert not lease.held()


def test_lease_cut_off_in_its_first_line(tmp_path):
    (tmp_path / "a.1").write_text("")
    assert claim(tmp_path, "a", stale_after=5) is None
    os.utime(tmp_path / "a.1", (0, 0))
    with claim(tmp_path, "a", stale_after=5) as lease:
        assert lease.held()


def race(directory, start, end, wins):
    for number in range(ROUNDS):
        start.wait(30)
        lease = claim(directory, f"round-{number}", stale_after=30)
        end.wait(30)
        if lease is not None:
            with wins.get_lock():
                wins[number] += 1
            lease.release()


def test_race_has_one_winner(tmp_path):
    """Every third round is for a fresh name, a stale lease, a released one."""
    for number in range(ROUNDS):
        path = tmp_path / f"round-{number}.1"
        if number % 3 == 1:
            write_holder(path)
            os.utime(path, (0, 0))
        elif number % 3 == 2:
            write_holder(path, released=True)
    context = multiprocessing.get_context("spawn")
    start, end, wins = context.Barrier(RACERS), context.Barrier(RACERS), context.Array("i", ROUNDS)
    racers = [context.Process(target=race, args=(tmp_path, start, end, wins)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * RACERS
    assert list(wins) == [1] * ROUNDS


def add_all(run_dir, start, added):
    results = EvaluationRecords(run_dir)
    start.wait(30)
    for number in range(ROUNDS):
        if results.add(EVALUATIONS, {"export": f"step-{number % 10}", "set": "valid", "ppl": 1.5}):
            with added.get_lock():
                added.value += 1


def test_a_result_is_on_record_once(tmp_path):
    """Also when two workers that each think the other dead have both evaluated it."""
    context = multiprocessing.get_context("spawn")
    start, added = context.Barrier(RACERS), context.Value("i", 0)
    writers = [context.Process(target=add_all, args=(tmp_path, start, added)) for _ in range(RACERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert added.value == 10 == len(records.read(tmp_path / EVALUATIONS))
    assert EvaluationRecords(tmp_path).done() == {(f"step-{number}", "valid") for number in range(10)}


def test_a_user_s_result_replaces_a_worker_s_and_keeps_it_aside(tmp_path):
    results = EvaluationRecords(tmp_path)
    lines = [{"export": f"step-{step}", "set": name, "ppl": 0.1 + step} for step in (1, 2) for name in ("a", "b")]
    for line in lines:
        assert results.add(EVALUATIONS, line)
    with open(tmp_path / EVALUATIONS, "a") as file:
        file.write('{"export": "step-')  # torn by a kill
    newer = {"export": "step-1", "set": "b", "ppl": 0.3, "chunks": 500}
    assert results.replace(newer)
    assert records.read(tmp_path / EVALUATIONS) == [lines[0], lines[2], lines[3], newer]
    assert records.read(tmp_path / REPLACED) == [lines[1]]
    assert not results.add(EVALUATIONS, lines[1])  # a worker that was at it comes late
    assert not results.replace({"export": "step-3", "set": "b", "ppl": 1.0})
    assert [line["export"] for line in records.read(tmp_path / EVALUATIONS)].count("step-1") == 2


def replace_all(run_dir, start, number):
    results = EvaluationRecords(run_dir)
    start.wait(30)
    for step in range(ROUNDS):
        results.replace({"export": f"step-{step % 10}", "set": "mine", "ppl": float(number)})


def test_users_and_workers_write_beside_one_another(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, added = context.Barrier(RACERS), context.Value("i", 0)
    targets = [(add_all, (tmp_path, start, added))] * 2 + [(replace_all, (tmp_path, start, n)) for n in range(2)]
    writers = [context.Process(target=target, args=words) for target, words in targets]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4 and added.value == 10
    keys = [(line["export"], line["set"]) for line in records.read(tmp_path / EVALUATIONS)]
    assert sorted(keys) == sorted((f"step-{number}", name) for number in range(10) for name in ("mine", "valid"))
    assert len(records.read(tmp_path / REPLACED)) == 2 * ROUNDS - 10
