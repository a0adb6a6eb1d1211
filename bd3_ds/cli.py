"""The command line: `bd3-ds MODE …`, which is also `python -m bd3_ds MODE …`, `python run.py MODE …` in a checkout, and
what the ranks of `deepspeed run.py train …` or `deepspeed --module bd3_ds train …` run.

A mode's module is imported only when it is asked for, and imports torch only after its arguments have been checked.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from bd3_ds.runtime.cli import program
from bd3_ds.runtime.errors import UserError, did_you_mean, leave, run_command


class Mode(NamedTuple):
    """Where a mode's `main(argv)` is, and what --help says of it."""

    module: str
    about: str


MODES = {
    "prepare": Mode("data_prep.prepare", "make a pack (MDS shards) of text: files, a dataset of the hub, a named set"),
    "train-tokenizer": Mode("data_prep.train_tokenizer", "train a sentencepiece tokenizer on a text"),
    "verify": Mode("data_prep.verify", "check a pack to its last token and show what is in it"),
    "zero-shot": Mode("data_prep.zero_shot", "make the zero-shot evaluation packs (LAMBADA, WikiText, …)"),
    "python-docs": Mode("data_prep.python_docs", "write the embedded corpus: documentation of the installed packages"),
    "synthetic": Mode("data_prep.synthetic", "make a pack of a source whose entropy is known"),
    "check": Mode("bd3_ds.commands.check", "plan a run: what it costs, whether it fits, what is wrong with it"),
    "train": Mode("bd3_ds.commands.train", "train a recipe as one rank of a launcher; continues where it stopped"),
    "launch": Mode("bd3_ds.launch.command", "train on all GPUs here or on a hostfile's, restarting what fails"),
    "eval-worker": Mode("bd3_ds.commands.eval_worker", "evaluate a run's exports as they appear"),
    "evaluate": Mode("bd3_ds.commands.evaluate", "the perplexity of an export on frozen sets, with its error"),
    "variance": Mode("bd3_ds.commands.variance", "how noisy training is under this and other noise schedules"),
    "sample": Mode("bd3_ds.commands.sample", "draw texts from an export"),
    "quality": Mode("bd3_ds.commands.quality", "judge drawn texts: generative perplexity, entropy, repetition, MAUVE"),
    "denoising": Mode("bd3_ds.commands.denoising", "a page of HTML that shows texts being denoised"),
    "harness": Mode("bd3_ds.commands.harness", "run EleutherAI's lm-evaluation-harness on an export"),
    "report": Mode("bd3_ds.commands.report", "tables and plots of one run, or of several side by side"),
    "summary": Mode("bd3_ds.commands.summary", "one table of what runs have reached"),
    "convert": Mode("bd3_ds.commands.convert", "models of bd3lms, MDLM and Hugging Face in, and exports out"),
}


def usage() -> str:
    """One line for each mode."""
    width = max(map(len, MODES))
    lines = [f"  {name:<{width}}  {mode.about}" for name, mode in MODES.items()]
    return "\n".join(
        [
            f"usage: {program()} MODE …      `{program()} MODE --help` explains each; --version prints the version",
            "",
            *lines,
            "",
            "Under a launcher: deepspeed --module bd3_ds train RECIPE; in a checkout deepspeed run.py train RECIPE.",
            "A RECIPE is a YAML file, or the name of one that is shipped, such as docs_pretrain.",
        ]
    )


def main(argv: list[str]) -> int | None:
    """Hand over to the mode's own main function."""
    # DeepSpeed's launcher adds --local_rank=N; the number is in the environment as well.
    argv = [word for word in argv if not word.startswith("--local_rank")]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from bd3_ds import __version__

        print(f"bd3-ds {__version__}")
        return 0
    mode, *rest = argv
    if mode not in MODES:
        raise UserError(f"unknown mode '{mode}'; {did_you_mean(mode, MODES)}")
    command: int | None = importlib.import_module(MODES[mode].module).main(rest)
    return command


def console() -> None:
    """The console script; it ends the process."""
    leave(run_command(main, sys.argv[1:]))
