"""Guards: stop signals, non-finite losses and loss spikes, a watchdog for stalled steps.

All ranks take the same decision, since it depends on numbers that are the same on every rank; only the watchdog acts on
its own rank.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import sys
import threading
from collections.abc import Sequence
from types import FrameType

MIN_LOSSES = 64  # before which nothing is a spike
BACKUP = 5  # seconds


def is_spike(recent: Sequence[float], nelbo: float, sigmas: float) -> bool:
    """Whether a loss lies more than `sigmas` standard deviations above the mean of those before it."""
    if len(recent) < MIN_LOSSES:
        return False
    return nelbo > statistics.fmean(recent) + sigmas * statistics.pstdev(recent)


class StopRequest:
    """Use as a context manager around the loop; SIGTERM and SIGINT then ask for a checkpoint and a clean end."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


class Watchdog:
    """Ends this process, with all its stacks on stderr, when `beat` was not called for `seconds`; 0: never.

    The launcher then ends the other ranks of the host, and those of other hosts meet a closed connection. Where the GIL
    is never released, Python's fault handler does the same a little later.
    """

    def __init__(self, seconds: int, rank: int):
        self._seconds = seconds
        self._rank = rank
        self._doing = "starting"
        self._beats = threading.Event()
        self._ended = False

    def __enter__(self) -> Watchdog:
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._beats.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """The run is alive and goes on to do this."""
        self._doing = doing
        self._beats.set()

    def _watch(self) -> None:
        while not self._ended:
            faulthandler.dump_traceback_later(self._seconds + BACKUP, exit=True)
            self._beats.clear()
            if not self._beats.wait(self._seconds) and not self._ended:
                print(
                    f"\nerror: rank {self._rank} has been {self._doing} for guards.stall_seconds={self._seconds}; "
                    "it ends here, and these are its stacks",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)
