"""The evaluation worker: follows a run and evaluates its exports.

The worker and the trainer meet on disk only: a committed export in, lines of records/eval.jsonl and points in
TensorBoard out. A slow or dead worker cannot stall the run; any number of workers may follow the same one.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_ds.evaluation import figures
from bd3_ds.evaluation.results import TEXTS, EvaluationRecords
from bd3_ds.evaluation.worker.cost import Pace, TooSlow, pace_of
from bd3_ds.evaluation.worker.leases import Lease, claim
from bd3_ds.evaluation.worker.machine import idle_device, idle_threads
from bd3_ds.runtime.errors import EXIT_USER_ERROR, UserError
from bd3_ds.runtime.run_dir import (
    ERRORS,
    EVALUATIONS,
    LEASES,
    RUN_YAML,
    SAMPLES,
    TENSORBOARD,
    finished_step,
    is_run,
)

if TYPE_CHECKING:
    import torch

    from bd3_ds.config.schema import EvalConfig, RunConfig
    from bd3_ds.evaluation.api import LanguageModel


class Stopped(Exception):
    """The worker was asked to end (SIGTERM, SIGINT)."""


class Worker:
    """Follows one run; see `commands/eval_worker.py`. `exit_code` is 0, or 2 or 1 once something could not be done.

    device, threads: None for what is idle when the first export is there, as a trainer then holds what it uses.
    max_chunks: None for the run's own. max_hours: the most that an export may take.
    """

    def __init__(
        self,
        run_dir: Path,
        device: torch.device | None,
        poll: float,
        threads: int | None = None,
        max_chunks: int | None = None,
        max_hours: float = 24.0,
    ):
        self.run_dir = run_dir
        self.poll = poll
        self._device, self._threads, self._ready = device, threads, False
        self._max_chunks, self._max_hours = max_chunks, max_hours
        self._pace: Pace | None = None
        self._planned = False
        self.results = EvaluationRecords(run_dir)
        self.exit_code = 0
        self._failed: set[tuple[str, str]] = set()  # (export, set); each worker tries what fails once
        self._asked = False
        self._writer: Any = None

    def follow(self, once: bool) -> None:
        """Work on every export, oldest first, so that the curves grow from the left."""
        if not self._configured():
            self.say(f"waiting for {self.run_dir / RUN_YAML}")
        while True:
            # Looked at before the exports are: a run that has finished has its last export on disk.
            finished = self._configured() and self._finished()
            left = self._work() if self._configured() else True
            if once or (finished and not left):
                self.say(f"nothing more to do: {self._state(left)}")
                return
            self._wait(self.poll)

    def _state(self, left: bool) -> str:
        """In what state the exports are left."""
        if self._failed:
            return f"{len(self._failed)} evaluations of {self.run_dir} failed, see above"
        return f"other workers have the rest of {self.run_dir}" if left else f"all of {self.run_dir} is evaluated"

    def stop(self) -> None:
        """Ask the worker to end at the next batch; for signal handlers, hence no more than a flag."""
        self._asked = True

    def say(self, text: str) -> None:
        """A line on the console."""
        print(f"eval-worker: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the event file."""
        if self._writer is not None:
            self._writer.close()

    def _configured(self) -> bool:
        return is_run(self.run_dir)

    def _finished(self) -> bool:
        """Whether the run has come to its end; an older, shorter run's note does not count."""
        return finished_step(self.run_dir) >= self._run().train.total_steps

    def _run(self) -> RunConfig:
        from bd3_ds.config.load import load_resolved
        from bd3_ds.config.plugins import require_plugins

        run = load_resolved(self.run_dir / RUN_YAML)
        require_plugins(run.plugins, str(self.run_dir))
        return run

    def _work(self) -> bool:
        """One look at all exports; True while something is left, in the hands of another worker or given up by one."""
        from bd3_ds.checkpoint.export import list_exports

        wanted = self._run().eval
        if self._max_chunks is not None:
            wanted = dataclasses.replace(wanted, max_chunks=self._max_chunks)
        done = self.results.done()
        left = False
        for path in list_exports(self.run_dir):
            self._check()
            if not self._missing(path.name, wanted, done):
                continue
            lease = claim(self.run_dir / LEASES, path.name)
            if lease is not None:
                with lease:
                    self._evaluate(path, wanted, lease)
            left = left or bool(self._missing(path.name, wanted, self.results.done()))
        return left

    def _missing(self, export: str, wanted: EvalConfig, done: set[tuple[str, str]]) -> list[str]:
        """The sets of an export, and TEXTS, that are neither on record nor known to fail."""
        items = [*wanted.sets, *([TEXTS] if wanted.samples else [])]
        return [item for item in items if (export, item) not in done | self._failed]

    def _evaluate(self, path: Path, wanted: EvalConfig, lease: Lease) -> None:
        # Looked up again under the lease: the worker that held it before may have got further than was seen.
        missing = self._missing(path.name, wanted, self.results.done())
        if not missing:
            return
        try:
            model = self._load(path)
        except UserError as error:
            for item in missing:
                self._fail(path.name, item, str(error), EXIT_USER_ERROR)
            return
        if not self._planned:
            self._planned = True
            self._pace = pace_of(model.run, wanted, self.run_dir, self._max_hours, self.say)
        for item in missing:
            if not lease.held():
                return
            try:
                if item == TEXTS:
                    self._sample(model, wanted)
                else:
                    self._score(model, item, wanted)
            except (Stopped, TooSlow):
                raise
            except UserError as error:
                self._fail(path.name, item, str(error), EXIT_USER_ERROR)
            except Exception as error:  # ours; the other sets and exports are worth having all the same
                traceback.print_exc()
                self._fail(path.name, item, repr(error), 1)

    def _load(self, path: Path) -> LanguageModel:
        from bd3_ds.checkpoint.export import find_export
        from bd3_ds.evaluation.api import LanguageModel

        try:
            return LanguageModel(find_export(str(path)), self.device())
        except UserError:
            self._wait(2)  # a run that was set back may just be replacing the export
            return LanguageModel(find_export(str(path)), self.device())

    def device(self) -> torch.device:
        """Where the worker computes, chosen when it is first asked for."""
        if not self._ready:
            import torch

            self._device = self._device or idle_device()
            threads = self._threads or idle_threads()
            torch.set_num_threads(threads)
            self._ready = True
            self.say(f"on {self._device}, {threads} CPU thread{'' if threads == 1 else 's'}")
        assert self._device is not None
        return self._device

    def _score(self, model: LanguageModel, name: str, wanted: EvalConfig) -> None:
        from bd3_ds.diffusion.likelihood import Estimator
        from bd3_ds.evaluation.perplexity import evaluate_pack
        from bd3_ds.evaluation.variance import variances_of

        export = model.export

        def progress(done: int, total: int) -> None:
            self._check()
            if self._pace is not None:
                self._pace.note(name, done, total, time.monotonic())

        record = evaluate_pack(
            model.network,
            export,
            wanted.sets[name],
            name,
            Estimator(wanted.estimator, wanted.views, at_once=wanted.batch),
            wanted.max_chunks,
            progress,
        )
        tags = ["ppl", "nelbo", "stderr"]
        if wanted.variance_batches > 1:
            try:
                record |= variances_of(model.network, export, wanted.sets[name], wanted, self._check)
                tags += ["var_nelbo", "var_block", "var_gradient"]
            except UserError as error:  # the perplexity is worth having all the same
                self.say(f"{export.name} {name}: no variances ({error})")
        if "report_loss" in record:
            tags += ["report_loss"]
        # TensorBoard first: killed in between, the next worker writes the point again, which does no harm.
        for tag in (tag for tag in tags if record[tag] is not None):
            self._tensorboard().add_scalar(f"eval/{name}/{tag}", record[tag], export.step)
        self._tensorboard().flush()
        if self.results.add(EVALUATIONS, record):
            self.say(
                f"{export.name} {name}: ppl {figures.perplexity(record)} (nelbo {figures.nats(record)} nats a token; "
                f"{figures.estimator(record)}; {figures.sequences(record)} sequences)"
            )

    def _sample(self, model: LanguageModel, wanted: EvalConfig) -> None:
        export = model.export
        record: dict[str, Any] = {"export": export.name, "step": export.step, "texts": []}
        try:
            record["texts"] = model.generate(num=wanted.samples, length=wanted.sample_length, prompt=None, seed=0)
        except UserError as error:
            # On record like samples, so that no later worker loads the export again for nothing.
            record["skipped"] = str(error)
            self.say(f"{export.name}: no samples ({error})")
        else:
            self._tensorboard().add_text("samples", as_markdown(record["texts"]), export.step)
            self._tensorboard().flush()
        self.results.add(SAMPLES, record)

    def _fail(self, export: str, item: str, sentence: str, exit_code: int) -> None:
        self._failed.add((export, item))
        self.exit_code = self.exit_code or exit_code
        name = item if item != TEXTS else "samples"
        if self.results.add(ERRORS, {"export": export, "set": name, "error": sentence}):
            self.say(f"error: {export} {name}: {sentence}")

    def _tensorboard(self) -> Any:
        """A writer with an event file of its own beside the trainer's."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            suffix = f".eval-{socket.gethostname()}-{os.getpid()}"
            self._writer = SummaryWriter(str(self.run_dir / TENSORBOARD), filename_suffix=suffix)
        return self._writer

    def _check(self, *_: int) -> None:
        if self._asked:
            raise Stopped

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check()
            time.sleep(min(left, 0.2))
        self._check()


def as_markdown(texts: list[str]) -> str:
    """Texts as indented blocks, which Markdown shows as they are."""
    blocks = ("\n".join(f"    {line}" for line in text.split("\n")) for text in texts)
    return "\n\n---\n\n".join(blocks)
