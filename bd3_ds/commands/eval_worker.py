"""`run.py eval-worker RUN_DIR`: follow a run and evaluate its exports beside it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from bd3_ds.evaluation.options import DEVICES, number_of_chunks, open_device
from bd3_ds.evaluation.worker.worker import Stopped, Worker
from bd3_ds.runtime.cli import Parser, at_least_one
from bd3_ds.runtime.errors import EXIT_INTERRUPTED, UserError
from bd3_ds.runtime.run_dir import is_run


def main(argv: list[str]) -> int:
    """Evaluate until the run has finished and nothing is left, or with --once what is there now."""
    options = worker_parser().parse(argv)
    if options.once and not is_run(options.run_dir):
        raise UserError(f"{options.run_dir} is not a run (it has no run.yaml); without --once the worker waits for it")

    if not options.max_hours > 0:
        raise UserError(f"--max-hours {options.max_hours:g} must be above 0")
    os.nice(10)
    device = None if options.device is None else open_device(options.device)
    worker = Worker(options.run_dir, device, options.poll, options.threads, options.max_chunks, options.max_hours)
    asked = _stop_on_signals(worker)
    try:
        worker.follow(options.once)
    except Stopped:
        worker.say("asked to stop; what is not on record is left to the next worker")
        return EXIT_INTERRUPTED if signal.SIGINT in asked else worker.exit_code
    finally:
        worker.close()
    return worker.exit_code


def _stop_on_signals(worker: Worker) -> list[int]:
    """Let SIGTERM and Ctrl-C stop the worker after its batch, a second one at once; the list fills with them."""
    asked: list[int] = []

    def handle(number: int, _: object) -> None:
        asked.append(number)
        worker.stop()
        if len(asked) > 1:
            raise Stopped
        if number == signal.SIGINT:
            worker.say("stopping after this batch (Ctrl-C again: at once)")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return asked


def worker_parser() -> Parser:
    """The options of `run.py eval-worker`."""
    parser = Parser(prog="run.py eval-worker", description="Evaluate a run's exports as they appear.")
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="the run; it may start later")
    add("--once", action="store_true", help="evaluate what is there now, then exit")
    add("--poll", type=at_least_one, default=5, metavar="SECONDS", help="between looks for new exports (default 5)")
    add(
        "--device",
        choices=DEVICES,
        help="default: the GPU with most free memory, or the CPU where all are in use",
    )
    add("--threads", type=at_least_one, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, or the idle cores)")
    add("--max-chunks", type=number_of_chunks, metavar="N|all", help="sequences of a set (default: eval.max_chunks)")
    add("--max-hours", type=float, default=24.0, metavar="H", help="refuse exports that take longer (default 24)")
    return parser
