"""Ranks as real processes with gloo, for what needs a process group and no engine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from bd3_ds.runtime.errors import UserError
from bd3_ds.runtime.world import World

_FORK = multiprocessing.get_context("fork")
WAIT = 30.0  # seconds after which ranks that wait for one another have parted


def on_ranks(count: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns on each rank, or the UserError that it raised; anything else that goes wrong fails."""
    with tempfile.TemporaryDirectory() as meeting:
        started = [_start(rank, count, meeting, work) for rank in range(count)]
        results = []
        try:
            for pipe, _ in started:
                assert pipe.poll(3 * WAIT), "a rank says nothing"
                results.append(pipe.recv())
        finally:
            for pipe, process in started:
                with suppress(OSError):
                    pipe.send("leave")
                process.join(5)
                process.kill()
    for result in results:
        assert not (isinstance(result, str) and result.startswith("Traceback")), result
    return results


def _start(rank: int, count: int, meeting: str, work: Callable[[World], Any]) -> Any:
    ours, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_run, args=(rank, count, meeting, work, theirs))
    process.start()
    theirs.close()
    return ours, process


def _run(rank: int, count: int, meeting: str, work: Callable[[World], Any], pipe: Any) -> None:
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}/store", timeout=timedelta(seconds=WAIT), rank=rank, world_size=count
        )
        pipe.send(work(World(rank, count, rank, count, torch.device("cpu"))))
    except UserError as error:
        pipe.send(error)
    except BaseException:
        pipe.send(traceback.format_exc())
    pipe.recv()  # all have what they need of each other
    os._exit(0)
