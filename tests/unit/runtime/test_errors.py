"""Half-sentences after unknown names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_ds.runtime.errors import (
    EXIT_INTERRUPTED,
    EXIT_NO_READER,
    UserError,
    did_you_mean,
    raised_on_all_ranks,
    report_errors_once,
    run_command,
)

ROOT = Path(__file__).resolve().parents[3]
SETS = ["openwebtext", "lm1b", "text8", "wikitext2", "wikitext103", "lambada", "ptb", "ag_news"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("wikitext", "did you mean 'wikitext103' or 'wikitext2'?"),
        ("Lambada", "did you mean 'lambada'?"),
        ("lambda", "did you mean 'lambada'?"),
        ("webtext", "did you mean 'openwebtext'?"),
        ("news", "did you mean 'ag_news'?"),
        ("c4", "known: ag_news, lambada, lm1b, openwebtext, ptb, text8, wikitext103, wikitext2"),
    ],
)
def test_names_that_are_alike(value: str, said: str) -> None:
    assert did_you_mean(value, SETS) == said


def test_no_wall_of_names() -> None:
    many = [f"section.key_{number:03}" for number in range(110)]
    assert did_you_mean("zzz", many).endswith("section.key_015 and 94 more")
    assert did_you_mean("section", many).endswith("'section.key_003' (or 106 more)?")
    assert did_you_mean("zzz", many, otherwise="see there") == "see there"


ENTRIES = ["run.py sample nowhere", "run.py evaluate nowhere", "run.py check nowhere", "-m data_prep.prepare --nothing"]


@pytest.mark.parametrize("words", ENTRIES)
def test_a_rank_in_the_environment_silences_no_command_of_one_process(words: str) -> None:
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_rank_that_fails_alone_speaks() -> None:
    """Rank 0 does not fail here, so nobody ends this one before it has spoken."""
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, "run.py", "train", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: recipe nowhere not found")


def test_what_all_ranks_know_is_said_by_rank_zero_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> int:
        report_errors_once({"RANK": argv[0], "WORLD_SIZE": "2"})
        raise raised_on_all_ranks(UserError("a mistake"))

    assert run_command(fail, ["1"]) == 2 and capsys.readouterr().err == ""
    assert run_command(fail, ["0"]) == 2 and capsys.readouterr().err == "error: a mistake\n"


PRINTS = "def main(argv):\n    for i in range(200000): print(i)\n"
WAITS = "def main(argv):\n    import time; print('here', flush=True); time.sleep(100)\n"
ENTRY = "import sys\nfrom bd3_ds.runtime.errors import leave, run_command\n{}leave(run_command(main, []))"


def test_output_that_nobody_reads_ends_quietly() -> None:
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ENTRY.format(PRINTS)], **options) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == EXIT_NO_READER


def test_ctrl_c_is_one_line() -> None:
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ENTRY.format(WAITS)], **options) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "stopped\n" and process.wait() == EXIT_INTERRUPTED
