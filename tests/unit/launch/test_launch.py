"""The supervisor's decisions, with small real processes in place of trainers; and the ranks that it settles on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bd3_ds.config.load import load_recipe
from bd3_ds.config.schema import RunConfig
from bd3_ds.launch.command import free_port, planned
from bd3_ds.launch.plan import Host, Plan, make_plan, read_hostfile
from bd3_ds.launch.supervisor import RunProgress, Verdict, code_in_words, judge
from bd3_ds.runtime.errors import UserError
from tests.helpers.launch import ROOT, wait_until

# One launch: a child that does what `$1` of the plan in RUN_DIR/script says, one word a start.
SUPERVISE = """
    import signal, subprocess, sys
    from pathlib import Path
    from bd3_ds.launch.supervisor import RunProgress, Supervisor

    run_dir = Path(sys.argv[1])
    starts = iter(sys.argv[3:])

    class Child:
        def __init__(self, script):
            self.process = subprocess.Popen([sys.executable, "-c", "import signal, sys, time\\n" + script])
        def signal(self, number):
            (run_dir / "signalled").write_text(str(number))
            self.process.send_signal(number)
            return True
        def alive(self):
            return False

    def start():
        script = next(starts)
        return None if script == "no hosts" else Child(script)

    sys.exit(Supervisor(start, RunProgress(run_dir, 10), int(sys.argv[2]), pause=0.01).run())
"""

FAIL = "sys.exit(1)"
SAVE = (
    "from pathlib import Path; p = Path('{0}/checkpoints/step-{1:08d}/manifest.json'); "
    "p.parent.mkdir(parents=True); p.touch(); sys.exit(1)"
)
FINISH = "from pathlib import Path; Path('{0}/records').mkdir(); "
FINISH += "Path('{0}/records/finished.json').write_text('{{\"step\": 10}}'); sys.exit(250)"
WAIT = "from pathlib import Path; signal.signal(15, lambda *_: sys.exit(0)); Path('{0}/ready').touch(); time.sleep(60)"


@pytest.mark.parametrize("given", [(), ("train.micro_batch=8",)])
def test_a_run_gets_the_plans_micro_batch_once(given):
    recipe = "configs/recipes/docs_pretrain.yaml"
    words = planned([recipe, "seed=3", *given, "--deepspeed_config", "x.json"], Plan(("localhost",), 2, 4))
    assert words == [recipe, "seed=3", "--deepspeed_config", "x.json", "train.micro_batch=4"]
    run = load_recipe(str(ROOT / recipe), [word for word in words[1:] if "=" in word])
    assert (run.seed, run.train.micro_batch) == (3, 4)


def test_ranks_meet_at_a_port_where_nobody_listens(monkeypatch):
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind(("", 0))
        probe.bind(("", 0))
        free = probe.getsockname()[1]
        probe.close()
        monkeypatch.setattr("bd3_ds.launch.command.PORTS", [taken.getsockname()[1], free])
        assert {free_port() for _ in range(8)} == {free}


def command(run_dir: Path, restarts: int, *starts: str) -> list[str]:
    words = [start.format(run_dir) if "{0}" in start else start for start in starts]
    return [sys.executable, "-c", textwrap.dedent(SUPERVISE), str(run_dir), str(restarts), *words]


@pytest.mark.parametrize(
    ("restarts", "starts", "code", "says"),
    [
        (0, [FINISH], 0, []),  # finished, whatever its code
        (0, [FAIL], 1, ["(code 1) at no checkpoint, and none of --restarts 0 is left"]),
        (1, [FAIL, FINISH], 0, ["restart 1 of 1"]),
        (1, [FAIL, "no hosts"], 1, ["none of --restarts 1 is left"]),
        (5, ["sys.exit(2)"], 2, []),
        (5, ["sys.exit(75)"], 75, []),  # somebody else asked the ranks to stop
        (
            1,
            [FAIL, SAVE.replace("{1:08d}", "00000004"), FAIL.replace("1", "3")],
            1,
            ["restart 1 of 1", "step-00000004"],
        ),
    ],
)
def test_what_follows_an_end(tmp_path, restarts, starts, code, says):
    done = subprocess.run(command(tmp_path, restarts, *starts), capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == code, done.stderr
    assert all(text in done.stderr for text in says), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_as_sigterm(tmp_path, number):
    process = subprocess.Popen(command(tmp_path, 5, WAIT), cwd=ROOT)
    wait_until((tmp_path / "ready").exists, 60, "the child")
    os.kill(process.pid, number)
    assert process.wait(60) == 75
    assert (tmp_path / "signalled").read_text() == str(int(signal.SIGTERM))


def test_judgement_rests_on_what_is_on_disk_first():
    assert judge(finished=True, asked=True, code=9) is Verdict.FINISHED
    assert judge(finished=False, asked=True, code=2) is Verdict.STOPPED
    assert judge(finished=False, asked=False, code=0) is Verdict.AGAIN


def a_run(**train: int) -> RunConfig:
    words = [f"train.{key}={value}" for key, value in train.items()]
    return load_recipe(str(ROOT / "configs/recipes/docs_pretrain.yaml"), words)


@pytest.mark.parametrize(
    ("slots", "batch", "micro", "shared", "hosts", "per_host", "fitted"),
    [
        ([8], 512, 32, 1, 1, 8, 32),
        ([8, 8], 512, 32, 1, 2, 8, 32),
        ([8, 8, 8], 512, 32, 1, 2, 8, 32),  # 24 and 21 ranks do not divide 512
        ([7], 512, 32, 1, 1, 4, 32),
        ([8, 8], 48, 32, 1, 2, 8, 3),
        ([8], 24, 5, 1, 1, 8, 3),
        ([8, 2], 12, 12, 1, 1, 6, 2),
        ([8], 4, 2, 4, 1, 8, 2),
        ([3, 3], 6, 6, 1, 2, 3, 1),
        ([2, 2], 64, 16, 4, 2, 2, 16),
    ],
)
def test_the_most_ranks_that_split_the_batch(slots, batch, micro, shared, hosts, per_host, fitted):
    run = a_run(global_batch=batch, micro_batch=micro, sequence_parallel=shared)
    plan = make_plan(run, [Host(f"n{index}", count) for index, count in enumerate(slots)])
    assert plan is not None and (len(plan.hosts), plan.per_host, plan.micro_batch) == (hosts, per_host, fitted)
    assert batch % (plan.ranks // shared * plan.micro_batch) == 0


def test_no_plan_where_a_sequence_needs_more_ranks():
    assert make_plan(a_run(sequence_parallel=4), [Host("n0", 3)]) is None
    assert make_plan(a_run(), []) is None


def test_hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two nodes\nnode1 slots=8\n\nnode2   slots=4  # half of it\n")
    assert read_hostfile(path) == [Host("node1", 8), Host("node2", 4)]
    for text, line in (("node1 slots=8\nnode1 slots=2", 2), ("node1", 1), ("node1 slots=0", 1)):
        path.write_text(text)
        with pytest.raises(UserError, match=f"line {line}: .* such as 'node1 slots=8'"):
            read_hostfile(path)
    path.write_text("# nobody\n")
    with pytest.raises(UserError, match="names no host"):
        read_hostfile(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_hostfile(tmp_path / "absent")


def test_what_a_user_keeps_beside_checkpoints_is_no_progress(tmp_path):
    progress = RunProgress(tmp_path, 10)
    assert progress.checkpoint() == ""
    for name in ("step-00000900", "step-123456789", "step-best", "step-999999999-backup"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert progress.checkpoint() == "step-123456789"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "code 1"),
        (75, "code 75"),
        (-11, "code -11: a rank was ended by signal 11"),
        (245, "code 245: a rank was ended by signal 11"),
        (247, "code 247: a rank was killed by signal 9, as the kernel does where memory runs out"),
    ],
)
def test_codes_tell_what_ended_a_rank(code, words):
    assert code_in_words(code) == words
