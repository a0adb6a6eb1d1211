"""Loader worker processes: their start method, and which signals they ignore."""

from __future__ import annotations

import os
import signal
import threading

import torch
from torch.utils.data import get_worker_info


def start_method() -> str:
    """How loader processes start: anew beside a GPU, whose driver and NCCL do not survive a fork; else by a fork, which
    takes no time. They are children of the trainer either way, so that `obey_parent_alone` knows whom to obey.
    """
    return "spawn" if torch.cuda.is_available() else "fork"


def obey_parent_alone(_worker: int) -> None:
    """A stop signal reaches every process of a run; loading goes on until the trainer has finished its step and saved.

    The trainer's own SIGTERM still counts: Python sends it to the children of an ending process and waits for them.
    """

    info = get_worker_info()
    assert info is not None

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        info.dataset.give_up()  # type: ignore[attr-defined]
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
