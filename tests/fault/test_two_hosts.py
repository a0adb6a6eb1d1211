"""Training over two hosts that share nothing but a file system, and a cable that is cut."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bd3_ds.checkpoint.store import complete_checkpoints
from bd3_ds.runtime.errors import EXIT_STOPPED
from bd3_ds.runtime.run_dir import FINISHED
from tests.helpers.launch import PATIENCE, ROOT, curve, free_port, train, wait_for_step, wait_until
from tests.helpers.tiny import tiny_run
from tests.helpers.two_hosts import ADDRESSES, TwoHosts, two_hosts, why_not

pytestmark = pytest.mark.slow

STALL = 15
WORDS = ("train.total_steps=400", "train.checkpoint_every=10", "train.export_every=400")
WORDS += (f"guards.stall_seconds={STALL}",)
LAUNCHER = 30 + 12  # seconds that DeepSpeed's launcher gives its ranks, and ssh to find that nobody answers


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run, on two ranks of one host; its recipe lies beside it."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("calm")
    tiny_run(place)
    train(place / "recipe.yaml", *WORDS, f"run_dir={place / 'calm'}")
    return place / "calm"


@pytest.fixture
def hosts(tmp_path: Path, calm: Path) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path / "hosts") as both:
        yield both


def launch(hosts: TwoHosts, log: Path, *words: str) -> subprocess.Popen[str]:
    command = ("deepspeed", "--hostfile", str(hosts.hostfile), "--launcher", "pdsh", "--master_addr", ADDRESSES[0])
    command += ("--master_port", str(free_port()), "run.py", "train", *words)
    return hosts.start(*command, stdout=log.open("a"), stderr=subprocess.STDOUT, cwd=ROOT)


def test_a_cut_cable_ends_the_job_which_then_continues(tmp_path, calm, hosts):
    recipe, cut, log = str(calm.parent / "recipe.yaml"), tmp_path / "cut", tmp_path / "log"
    process = launch(hosts, log, recipe, *WORDS, f"run_dir={cut}")
    wait_for_step(cut, 20, process)
    hosts.cut()
    wait_until(lambda: process.poll() is not None and not hosts.ranks(), STALL + LAUNCHER, "the end of the cut job")
    said = log.read_text()
    assert process.returncode != 0 and not (cut / FINISHED).exists(), said
    assert "guards.stall_seconds=15" in said, said
    saved = complete_checkpoints(cut / "checkpoints")[-1].state["step"]
    assert saved >= 10

    hosts.mend()
    process = launch(hosts, log, recipe, *WORDS, f"run_dir={cut}")
    assert process.wait(timeout=200) == 0, log.read_text()
    assert f"step {saved}" in log.read_text()
    assert (cut / FINISHED).exists() and curve(cut) == curve(calm)


def test_the_supervisor_goes_on_without_a_lost_host_and_saves_on_both(tmp_path, calm, hosts):
    recipe, lost, log = str(calm.parent / "recipe.yaml"), tmp_path / "lost", tmp_path / "log"
    command = (sys.executable, "-m", "bd3_ds", "launch", "--hostfile", str(hosts.hostfile), "--restarts", "3")
    command += ("--backoff", "0.1", recipe, *WORDS, f"run_dir={lost}")

    process = hosts.start(*command, stdout=log.open("a"), stderr=subprocess.STDOUT, cwd=ROOT)
    wait_for_step(lost, 20, process)
    psutil.Process(process.pid).children()[0].send_signal(signal.SIGTERM)  # nsenter waits for it
    assert process.wait(PATIENCE) == EXIT_STOPPED, log.read_text()
    saved = complete_checkpoints(lost / "checkpoints")[-1].state["step"]
    assert not hosts.ranks() and "asked to stop: saved" in log.read_text() and saved >= 20

    process = hosts.start(*command, stdout=log.open("a"), stderr=subprocess.STDOUT, cwd=ROOT)
    wait_for_step(lost, saved + 10, process)
    hosts.cut()
    assert process.wait(PATIENCE) == 0, log.read_text()
    said = log.read_text()
    assert said.count("2 of 2 ranks (2 hosts x 1)") == 2 and "1 of 1 ranks (1 host x 1)" in said
    assert f"{ADDRESSES[1]} does not answer" in said
    assert (lost / FINISHED).exists()
    ours, theirs = curve(lost), curve(calm)
    assert all(ours[step] == pytest.approx(theirs[step], rel=1e-3) for step in theirs)


def test_plain_ssh_starts_each_host_by_its_number(tmp_path, calm, hosts):
    run, log, tools = tmp_path / "plain", tmp_path / "log", Path(sys.executable).parent
    words = f"run.py train {calm.parent / 'recipe.yaml'} {' '.join(WORDS)} run_dir={run}"
    ours = f"PATH={tools}:$PATH GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=/dev/shm/operators"
    script = f"""
        n=0; for host in {" ".join(ADDRESSES)}; do
          ssh $host "cd {ROOT} && {ours} deepspeed --hostfile {hosts.hostfile} --no_ssh --node_rank $n \
            --master_addr {ADDRESSES[0]} {words}" & n=$((n + 1))
        done; wait
    """
    process = hosts.start("bash", "-c", script, stdout=log.open("a"), stderr=subprocess.STDOUT, cwd=ROOT)
    assert process.wait(PATIENCE) == 0 and (run / FINISHED).exists(), log.read_text()
    assert curve(run) == curve(calm)
