"""The ranks of one launch, on this host or another: which are there, and a signal for them.

They are told apart by their launcher's master port: each is a child of a `deepspeed.launcher.launch` that has it. Their
launcher is never signalled itself, since it gives its ranks 30 s, and saving may take longer.

`python -m bd3_ds.launch.processes PORT [SIGNAL]` prints their process ids.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil

from bd3_ds.runtime.resources import ROOT

LOCAL = "localhost"
_RANK = "--local_rank="
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
_PATIENCE = 30  # seconds for a host that has answered to do what it is asked


def find_ranks(port: int) -> list[psutil.Process]:
    """Rank processes of this host whose launch meets at `port`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "deepspeed.launcher.launch" in words and f"--master_port={port}" in words:
                # pdsh has the same words, and ssh for children
                found += [child for child in process.children() if any(w.startswith(_RANK) for w in child.cmdline())]
    return found


def ranks_on(hosts: Iterable[str], port: int, number: int = 0) -> dict[str, list[int] | None]:
    """Process ids of the launch's ranks by host, each sent signal `number` unless it is 0; None: the host is silent."""
    command = shlex.join(["cd", str(ROOT)]) + " && "
    command += shlex.join([sys.executable, "-m", "bd3_ds.launch.processes", str(port), str(number)])
    return _everywhere(hosts, command)


def answering(hosts: Iterable[str]) -> list[str]:
    """Those of the hosts that ssh reaches within seconds and that see the project, this directory and this Python."""
    command = shlex.join(["test", "-x", sys.executable, "-a", "-d", str(ROOT), "-a", "-d", os.getcwd()])
    return [host for host, answer in _everywhere(hosts, command).items() if answer is not None]


def _everywhere(hosts: Iterable[str], command: str) -> dict[str, list[int] | None]:
    hosts = list(hosts)
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(lambda host: _ask(host, command), hosts), strict=True))


def _ask(host: str, command: str) -> list[int] | None:
    words = ["sh", "-c", command] if host == LOCAL else [*_SSH, host, command]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return None
    return [int(word) for word in done.stdout.split()] if done.returncode == 0 else None


def main(argv: list[str]) -> None:
    """Print the ranks' process ids, and signal them where the second word is not 0."""
    port, number = int(argv[0]), int(argv[1]) if len(argv) > 1 else 0
    for process in find_ranks(port):
        with suppress(psutil.Error):
            if number:
                process.send_signal(number)
            print(process.pid)


if __name__ == "__main__":
    main(sys.argv[1:])
