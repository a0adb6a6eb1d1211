"""Start a run, and start it again until it is finished; what is on disk decides, since launchers' codes are unreliable.

One host's launcher turns a signal into 1, several hosts' codes become the largest of them, and a rank that has done all
its work may still end badly.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Protocol

from bd3_ds.runtime.errors import EXIT_STOPPED, EXIT_USER_ERROR
from bd3_ds.runtime.run_dir import CHECKPOINTS, finished_step
from bd3_ds.runtime.step_names import step_of

LINGER = 45.0  # seconds for ranks after their launcher; it gives them 30
LONGEST_PAUSE = 300.0  # seconds between two starts


class Verdict(Enum):
    """What to do after a launch has ended."""

    FINISHED = 0
    MISTAKE = EXIT_USER_ERROR
    STOPPED = EXIT_STOPPED
    AGAIN = 1


@dataclass(frozen=True)
class RunProgress:
    """What a run directory shows from outside, without reading tensors."""

    run_dir: Path
    total_steps: int

    def finished(self) -> bool:
        """All steps are trained; a run that was given more steps since is not."""
        return finished_step(self.run_dir) >= self.total_steps

    def checkpoint(self) -> str:
        """The newest committed checkpoint; empty if there is none."""
        names = (path.parent.name for path in (self.run_dir / CHECKPOINTS).glob("step-*/manifest.json"))
        return max((step, name) for name in ("", *names) if (step := step_of(name) if name else -1) is not None)[1]


class Launch(Protocol):
    """A started launcher and its ranks, wherever they are."""

    process: subprocess.Popen[bytes]

    def signal(self, number: int) -> bool:
        """Signal the ranks themselves; False while not all of them are there yet."""

    def alive(self) -> bool:
        """Whether a rank runs on any host that answers."""


def judge(finished: bool, asked: bool, code: int) -> Verdict:
    """`asked`: this supervisor was asked to stop; `code`: the launcher's."""
    if finished:
        return Verdict.FINISHED
    if asked or code == EXIT_STOPPED:
        return Verdict.STOPPED
    return Verdict.MISTAKE if code == EXIT_USER_ERROR else Verdict.AGAIN


def code_in_words(code: int) -> str:
    """A launcher's code; DeepSpeed's gives that of a rank which a signal ended as 256 less the signal's number."""
    number = -code if code < 0 else 256 - code if code > 192 else 0
    if number == signal.SIGKILL:
        return f"code {code}: a rank was killed by signal 9, as the kernel does where memory runs out"
    return f"code {code}: a rank was ended by signal {number}" if number else f"code {code}"


class Supervisor:
    """`start` launches the run on what is there now, or returns None where nothing is.

    SIGTERM and SIGINT ask the ranks to save and leave, the second one ends them at once.
    """

    def __init__(self, start: Callable[[], Launch | None], progress: RunProgress, restarts: int, pause: float):
        self._start = start
        self._progress = progress
        self._restarts = restarts
        self._pause = pause
        self._asked = 0

    def run(self) -> int:
        """Launch until the run is finished, stopped, failed by a user's mistake, or has failed too often; the exit
        code.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        failures = 0
        while True:
            before = self._progress.checkpoint()
            launch = self._start() if not self._asked else None
            code = 1 if launch is None else self._wait(launch)
            verdict = judge(self._progress.finished(), self._asked > 0, code)
            if verdict is not Verdict.AGAIN:
                return verdict.value
            failures = 1 if self._progress.checkpoint() != before else failures + 1
            newest, words = self._progress.checkpoint() or "no checkpoint", code_in_words(code)
            if failures > self._restarts:
                self._say(f"the run failed ({words}) at {newest}, and none of --restarts {self._restarts} is left")
                return 1
            pause = min(self._pause * 2 ** (failures - 1), LONGEST_PAUSE)
            self._say(f"the run failed ({words}) at {newest}; restart {failures} of {self._restarts} in {pause:g} s")
            self._sleep(pause)

    def _wait(self, launch: Launch) -> int:
        """The launcher's code, once it and its ranks have ended; ranks that outlive it for long are killed."""
        sent = 0
        while launch.process.poll() is None:
            if self._asked > sent and launch.signal(signal.SIGTERM if self._asked == 1 else signal.SIGKILL):
                sent = self._asked
            time.sleep(0.2)
        deadline = time.monotonic() + LINGER
        while launch.alive():
            if time.monotonic() > deadline:
                launch.signal(signal.SIGKILL)
            time.sleep(0.5)
        return launch.process.returncode

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._asked:
            time.sleep(min(0.2, seconds))

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._asked += 1

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
