"""Worker processes for a reading parent: they end with it, and one that dies is noticed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from bd3_ds.runtime.errors import UserError


class Workers:
    """`count` processes, each of which first calls `start(*arguments)`; one "process" is the calling one itself."""

    def __init__(self, count: int, start: Callable[..., None], *arguments: Any):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        if count == 1:
            start(*arguments)
        else:
            # Spawned: a fork would copy the reader's locks and open files.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, context, _start, (start, arguments))

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have work(*arguments) done; with one process it is done at once."""
        if self._pool is not None:
            try:
                with _ctrl_c_is_for_this_process():
                    return self._pool.submit(work, *arguments)
            except BrokenProcessPool:
                raise _killed() from None
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=error is not None)


def result(future: Future[Any]) -> Any:
    """What the work returned; raises what it raised, and UserError where its process was killed."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise _killed() from None


@contextmanager
def _ctrl_c_is_for_this_process() -> Iterator[None]:
    """Processes that are started meanwhile never see SIGINT, which a terminal sends to all: they end with this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _killed() -> UserError:
    return UserError(
        "a worker process was killed, perhaps for want of memory; give the same command again, with fewer --workers if "
        "it happens again: what is finished is kept"
    )


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    start(*arguments)
