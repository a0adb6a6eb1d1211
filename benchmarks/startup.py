"""From the command to the first optimizer step: seconds of a start, by phase, beside those of the fastest commands.

    python -m benchmarks.startup [--model nano] [--length 64] [--starts 3] [--repeats 5] [--json FILE]

`starts`, a training run of one step, ended properly: by `python run.py` alone, and by DeepSpeed's launcher on 1 and 2
ranks of one thread each. The phases are told apart by what can be seen from outside:
  launcher     until the process of a rank is there
  imports      until run.yaml is there: configuration and shards checked, torch and DeepSpeed imported, ranks joined
               (the first start on a machine may compile DeepSpeed's collectives and read files that are in no cache:
               the warm-up is for that)
  engine       until TensorBoard's file is there: DeepSpeed's engine and the averaged weights made, TensorBoard loaded
  first_step   until the first line of records/train.jsonl: streaming imported, the loader made, one step done;
               `step` is the step alone
  end          until the command ends: export, checkpoint, goodbye
`to_first_step` is all but the end. The phases of a rank are those of rank 0.

`imports`: seconds of each import in the trainer's order in one fresh process, so each is what it adds to those before.
`commands`: what does not train: the interpreter alone, help, mistakes that end with 2, with and without the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bd3_ds.runtime import records
from bd3_ds.runtime.errors import EXIT_USER_ERROR
from bd3_ds.runtime.run_dir import TRAIN_RECORDS
from benchmarks.measure import ROOT, finish, interleaved, launched, parser, run_to_end, say, summary
from tests.helpers.tiny import tiny_pack

MODULES = ("torch", "deepspeed", "bd3_ds.train.build", "torch.utils.tensorboard", "streaming")  # as the trainer does
KINDS = {"python": (1, False), "launcher, 1 rank": (1, True), "launcher, 2 ranks": (2, True)}  # ranks, launcher
PATIENCE = 600.0  # seconds for one start

# Run as a child: JSON of the seconds of each import. DeepSpeed is told of CPUs as the trainer tells it.
IMPORTS = """
import importlib, json, os, sys, time
from bd3_ds.data.streaming_import import import_streaming
seconds = {}
for name in sys.argv[1:]:
    start = time.perf_counter()
    import_streaming() if name == "streaming" else importlib.import_module(name)
    seconds[name] = time.perf_counter() - start
    if name == "torch" and not sys.modules["torch"].cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
print(json.dumps(seconds))
"""


def main(argv: list[str]) -> int:
    options = parser(__doc__)
    options.add_argument("--model", default="nano", help="a name in configs/model")
    options.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    options.add_argument("--starts", type=int, default=3, help="training runs of each kind, in turn")
    options.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    asked = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        recipe = write_recipe(scratch, asked.model, asked.length)
        results = {
            "starts": measure_starts(scratch, recipe, asked),
            "imports": measure_imports(asked.repeats, asked.warmup),
            "commands": measure_commands(scratch, recipe, asked.repeats, asked.warmup),
        }
    finish("startup", asked, results, asked.json)
    return 0


def write_recipe(scratch: Path, model: str, length: int) -> Path:
    """A run of one step on a pack of 64 sequences, its record written at once."""
    tiny_pack(scratch / "pack", length=length, chunks=64)
    recipe = scratch / "recipe.yaml"
    recipe.write_text(
        f"include: [model/{model}]\n"
        f"data: {{train: {scratch / 'pack'}, length: {length}}}\n"
        "objective: {name: bd3, block_size: 16}\n"
        "train: {total_steps: 1, global_batch: 2, micro_batch: 1, log_every: 1}\n"
    )
    return recipe


def measure_starts(scratch: Path, recipe: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Summaries of each phase by kind of start."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
    for number in range(asked.warmup + asked.starts):
        for name in KINDS if number % 2 == 0 else reversed(KINDS):
            ranks, launcher = KINDS[name]
            phases = start_once(recipe, scratch / f"{number}-{ranks}-{launcher}", ranks, launcher)
            say(f"start {number + 1}, {name}: {phases['to_first_step']:.1f} s")
            if number >= asked.warmup:
                runs[name].append(phases)
    return {
        name: {phase: summary([phases[phase] for phases in several]) for phase in several[0]}
        for name, several in runs.items()
    }


def start_once(recipe: Path, run_dir: Path, ranks: int, launcher: bool) -> dict[str, float]:
    """Seconds of each phase of one run."""
    log = run_dir.with_suffix(".log")
    words = ["train", str(recipe), f"run_dir={run_dir}", f"train.micro_batch={2 // ranks}"]
    begin = time.perf_counter()
    with (
        log.open("w") as file,
        launched(words, ranks=ranks, launcher=launcher, stdout=file, stderr=subprocess.STDOUT) as process,
    ):

        def when(there: Callable[[], bool], pause: float = 0.005) -> float:
            while not there():
                ended = process.poll() is not None and not there()
                if ended or time.perf_counter() - begin > PATIENCE:
                    raise RuntimeError(f"the run got stuck or ended early:\n{log.read_text()[-4000:]}")
                time.sleep(pause)
            return time.perf_counter() - begin

        # Looking through processes costs a core some time, so it is done seldom, and no more once the rank is there.
        marks = [0.0, when(lambda: rank_is_there(process.pid), pause=0.05) if launcher else 0.0]
        marks.append(when((run_dir / "run.yaml").exists))
        marks.append(when(lambda: any(run_dir.glob("tensorboard/events.*"))))
        marks.append(when(lambda: bool(records.read(run_dir / TRAIN_RECORDS))))
        code = process.wait(timeout=PATIENCE)
        marks.append(time.perf_counter() - begin)
    if code != 0:
        raise RuntimeError(f"the run ended with {code}:\n{log.read_text()[-4000:]}")
    names = ("launcher", "imports", "engine", "first_step", "end")
    phases = {name: later - earlier for name, earlier, later in zip(names, marks, marks[1:], strict=False)}
    step = float(records.read(run_dir / TRAIN_RECORDS)[0]["seconds"])
    return {"to_first_step": marks[4], **phases, "step": step}


def rank_is_there(launcher: int) -> bool:
    """Whether a rank's process runs below the launcher, which starts a launcher of this machine in between."""
    with suppress(psutil.Error):
        for child in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):
                words = child.cmdline()
                if "run.py" in words and not any(word.startswith("deepspeed.launcher") for word in words):
                    return True
    return False


def measure_imports(repeats: int, warmup: int) -> dict[str, Any]:
    """Summary of each import's seconds."""
    command = [sys.executable, "-c", IMPORTS, *MODULES]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    runs = []
    for _ in range(warmup + repeats):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: summary([run[name] for run in runs[warmup:]]) for name in MODULES}


def measure_commands(scratch: Path, recipe: Path, repeats: int, warmup: int) -> dict[str, Any]:
    """Summary of each command's seconds; a command that ends with another code than it should stops the benchmark."""
    log = scratch / "command.log"
    good, bad = ["train", str(recipe)], ["train", str(recipe), f"run_dir={scratch / 'never'}"]

    def command(words: list[str], code: int = 0, launcher: bool = False, ranks: int = 1) -> Callable[[], None]:
        return lambda: run_to_end(words, log, code, launcher=launcher, ranks=ranks)

    variants: dict[str, Callable[[], object]] = {
        "python -c pass": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        "run.py --help": command(["--help"]),
        "run.py train --help": command(["train", "--help"]),
        "run.py train, unknown option": command([*good, "--no-such-option"], EXIT_USER_ERROR),
        "run.py train, unknown key": command([*bad, "optim.no_such_key=1"], EXIT_USER_ERROR),
        "launcher, 1 rank, unknown option": command([*good, "--no-such-option"], EXIT_USER_ERROR, launcher=True),
        "launcher, 2 ranks, unknown key": command([*bad, "optim.no_such_key=1"], EXIT_USER_ERROR, True, 2),
    }
    return {name: summary(seconds) for name, seconds in interleaved(variants, repeats, warmup).items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
